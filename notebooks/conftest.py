"""`pytest notebooks` compares the outputs in this folder with those that `make book` has just computed, by nbval.

nbval would execute every notebook a second time, to learn what it gives. It is given a kernel that plays back what the
executed copy holds instead; which outputs count, and how they are compared, is nbval's own. (`pytest --nbval notebooks`
executes them.)
"""

from pathlib import Path

import nbformat
from nbval.plugin import IPyNbFile

EXECUTED = Path(__file__).parent.parent / "_build" / "executed"


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.parent == Path(__file__).parent and not parent.config.option.nbval:
        return ExecutedNotebook.from_parent(parent, path=file_path)


class ExecutedNotebook(IPyNbFile):
    """A notebook whose executed copy is there."""

    def setup(self):
        self.kernel = PlayedBack(EXECUTED / self.path.name)
        self.setup_sanitize_files()


class PlayedBack:
    """Stands where nbval's kernel stands: asked to run a cell, it gives that cell's outputs in the executed copy."""

    def __init__(self, path: Path):
        self.path = path
        self.cells = iter([cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"])

    def is_alive(self):
        return True

    def execute_cell_input(self, source, allow_stdin):
        cell = next(self.cells)
        assert cell.source == source, f"{self.path} was executed from another version; run `make book` first"
        parts = [(output.output_type, output) for output in cell.outputs] + [("status", {"execution_state": "idle"})]
        self.messages = iter([{"parent_header": {"msg_id": 0}, "msg_type": kind, "content": of} for kind, of in parts])
        return 0

    def await_reply(self, msg_id, timeout):
        pass

    def get_message(self, stream, timeout):
        return next(self.messages)

    def stop(self):
        pass
