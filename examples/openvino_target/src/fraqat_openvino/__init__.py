"""OpenVINO as a target of fraqat_compiler; the entry point in pyproject.toml names the class."""
