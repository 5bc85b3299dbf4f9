"""Start a worker on the code of the package that this file lies in, wherever the process is started.

`python -P qwen3bench/worker/boot.py`. A directory may hold another `qwen3bench/`, which `python -m` would import. The
current directory comes last on the path, for a user's own package.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def _load_package(directory: Path) -> None:
    """Import the package in `directory` under its name, and so its modules, whatever the path says."""
    places = [str(directory)]
    spec = spec_from_file_location(directory.name, directory / "__init__.py", submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[directory.name] = package = module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _load_package(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path.cwd()))
    from qwen3bench.worker.serve import main

    main()
