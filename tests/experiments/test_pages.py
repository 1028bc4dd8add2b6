from experiments.pages import Table

TABLE = Table(["network", "form", "ms"], [["one", "a|b", "1.50"], ["two", "**dense**", "-"]], words=("form",))


def test_only_columns_of_numbers_stand_to_the_right_in_markdown() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[:2] == ["| network | form | ms |", "| --- | --- | ---: |"]
    assert lines[3] == "| two | **dense** | - |"


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    assert TABLE.markdown().splitlines()[2] == r"| one | a\|b | 1.50 |"


def test_only_columns_of_numbers_stand_to_the_right_in_html() -> None:
    head, body = TABLE.html().split("<tbody>")
    assert '<tr><th>network</th><th>form</th><th class="number">ms</th></tr>' in head
    assert '<tr><td>two</td><td><b>dense</b></td><td class="number">-</td></tr>' in body
