"""The optional compiled CPU kernels; everything else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE_CPU = Extension(
    "em_kernels._entropy_cpu",
    sources=["csrc/entropy_cpu.cpp"],
    depends=sorted(glob("csrc/*.h")),
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    # Without a compiler the package installs all the same, and runs on PyTorch's own operators.
    optional=True,
)


class BuildPlainLibrary(build_ext):
    """Names a shared library with a plain C interface without the Python ABI that extension modules carry."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for the platform but for no Python version: ctypes loads the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[NATIVE_CPU], cmdclass={"build_ext": BuildPlainLibrary, "bdist_wheel": AnyPythonWheel})
