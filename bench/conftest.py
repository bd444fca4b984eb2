"""Makes pytest collect bench_*.py in this folder, as it collects test_*.py elsewhere."""

import pytest


def pytest_collect_file(file_path, parent):
    named_on_the_command_line = parent.session.isinitpath(file_path)
    if file_path.match("bench_*.py") and not named_on_the_command_line:
        return pytest.Module.from_parent(parent, path=file_path)
    return None
