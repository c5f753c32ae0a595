"""Goes on `PYTHONPATH` of `pip download`, so that Python loads its `sitecustomize`; nothing imports it from here."""
