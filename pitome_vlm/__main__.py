"""`python -m pitome_vlm` is `pitome-vlm`."""

from .cli import main

if __name__ == "__main__":
    main()
