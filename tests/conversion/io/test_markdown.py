from conversion.io.markdown import table


def test_a_table_has_a_line_for_every_row():
    """No text of a cell ends the cell or its line."""
    assert table(["a", ""], [["1|2", "3\n 4"], ["", "5"]]).splitlines() == [
        "| a |  |",
        "| --- | --- |",
        "| 1&#124;2 | 3 4 |",
        "|  | 5 |",
    ]
