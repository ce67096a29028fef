"""The figures in the documentation are those of the committed results."""

import pytest

from benchmarks.tables import PAGES, TABLES, filled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert filled(text) == text, "run `make tables`"


def test_every_table_stands_somewhere():
    pages = "".join(page.read_text() for page in PAGES)
    assert all(f"<!-- table {name} -->" in pages for name in TABLES)
