"""The functions of Python that the verbs are, too: keywords in the place of a recipe, results that print well."""
