"""Copy the outputs of executed notebooks into `notebooks/`, without papermill's own metadata.

python scripts/keep_outputs.py _build/executed/*.ipynb
"""

import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop times and host details, which change with every run; join what one stream wrote in pieces."""
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list) -> list:
    """Outputs with neighbours of one stream as one."""
    found = []
    for output in outputs:
        if found and output.output_type == "stream" and output.get("name") == found[-1].get("name"):
            found[-1].text += output.text
        else:
            found.append(output)
    return found


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        nbformat.write(clean(nbformat.read(path, as_version=4)), NOTEBOOKS / path.name)
        print(f"outputs kept: notebooks/{path.name}")
