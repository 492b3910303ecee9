"""The built-in passes, one file each; `fraqat_compiler.registry` lists them and loads one when it is named."""

if __name__ != "fraqat_compiler.passes":
    raise ImportError(f"import fraqat_compiler.passes, not {__name__}: else each pass would exist twice")
