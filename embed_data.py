"""The build step: a wheel carries the manifest and the released weights inside the package, as `cim_models/_data`.

The sources keep them at the top level, where an editable install and a plain copy find them beside the package.
"""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py as setuptools_build_py


class build_py(setuptools_build_py):
    """Copies `weights_manifest.json` and `weights/` into the folder that becomes the wheel, never into the sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        data = Path(self.build_lib, "cim_models", "_data")
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree("weights", data / "weights")
        shutil.copy("weights_manifest.json", data)
