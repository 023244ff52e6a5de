"""Run docs/quickstart.ipynb and store its outputs: `python -m scripts.docs.notebook`.

Progress bars and times of running are left out, so that a repeat on the same machine changes
nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/quickstart.ipynb"


def executed(notebook: Any) -> Any:
    """The notebook with the outputs of a run in docs/; raises where a cell does."""
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    options = {"timeout": 300, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            cell.metadata = {}
    return notebook


def outputs(notebook: Any) -> list[list[str]]:
    """What every cell of code shows: text as it is, of images that there is one."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = []
            for one in cell.outputs:
                data = one.get("data", {})
                image = "image/png" in data
                shown.append("image" if image else one.get("text") or data["text/plain"])
            found.append(shown)
    return found


def main() -> None:
    """Run and store."""
    nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4)), NOTEBOOK)
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
