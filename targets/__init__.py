"""The built-in targets; `fraqat_compiler.registry` lists them and loads one when it is named."""

if __name__ != "fraqat_compiler.targets":
    raise ImportError(f"import fraqat_compiler.targets, not {__name__}: else each target would exist twice")
