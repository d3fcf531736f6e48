"""What pages of measurements say still holds, where it can be tried in a moment."""

from benchmarks.formats import PAGE, page


def test_the_page_of_formats_says_what_is_so() -> None:
    assert PAGE.read_text("utf-8") == page()
