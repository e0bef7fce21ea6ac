"""Compiles the native kernels when the package is built; without a compiler the package is built without them."""

from __future__ import annotations

import runpy
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Adds the compiled library to wheels."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the wheel is put together."""
        if self.target_name != "wheel":
            return
        native = "src/sparing/kernels/native"
        try:
            runpy.run_path(f"{self.root}/{native}/build.py")["build"]()
        except RuntimeError as error:
            print(f"sparing: built without native kernels, torch will decode: {error}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{self._platform()}"
        build_data["artifacts"].append(f"{native}/libsparing_kernels.so")

    @staticmethod
    def _platform() -> str:
        import sysconfig

        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
