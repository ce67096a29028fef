"""The figures in the documentation are those of the committed results."""

from benchmarks.tables import PAGE, TABLES, filled


def test_tables_are_those_of_the_results():
    page = PAGE.read_text()
    assert filled(page) == page, "run `make tables`"
    assert all(f"<!-- table {name} -->" in page for name in TABLES)
