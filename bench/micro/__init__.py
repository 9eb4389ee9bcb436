"""The figures that decided the schema: `rows` is the history's layout, `status` the indexes of the last status."""
