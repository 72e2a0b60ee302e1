"""Kinds of public model folders beside the dense one, each a class on the shelf `forms` in a file of its own: how it is
known, what it is made of, and how it is written back.

    @forms.register("splade")
    class Splade:
        \"\"\"SparseEncoder: Transformer, SpladePooling.\"\"\"

        @staticmethod
        def facts(files: FolderFiles) -> FolderFacts | None: ...

        @staticmethod
        def write(saved: Saved, root: Path) -> None: ...

`facts` is `None` for modules of another kind. `write` is given a folder in the dense form and makes it into its own.
"""
