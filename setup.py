"""Finds packages in the rooms, so that a new folder needs no edit here."""

from setuptools import find_packages, setup

ROOMS = {"compress": "compress", "compress.passes": "passes", "compress.kernels": "kernels", "compress.recipes": "recipes"}
packages = [name for room, folder in ROOMS.items() for name in [room, *(f"{room}.{p}" for p in find_packages(folder))]]
data = [
    "*.jinja", "*.cu", "*.cuh", "cubins/*.zip", "*.cpp", "*.h", "prebuilt/*.so", "*.yaml", "*.md", "*.json", "*.jsonl",
    "*.safetensors", "py.typed", "model/*", "text/*",
]  # fmt: skip

setup(include_package_data=False, package_dir=ROOMS, packages=packages, package_data=dict.fromkeys(packages, data))
