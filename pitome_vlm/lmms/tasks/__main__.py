"""For shells: `lmms-eval --include_path "$(python -m pitome_vlm.lmms.tasks)" ...`."""

import sys

from pitome_vlm.lmms import tasks_path

sys.stdout.write(f"{tasks_path()}\n")
