"""The page of faults is what the tests are marked with, and every fault has its test."""

from tests.faults.table import FAULTS, PAGE, fault_page, marked_tests

KNOWN = [fault for faults in FAULTS.values() for fault in faults]


def test_every_fault_has_a_test_and_every_mark_a_fault() -> None:
    assert len(KNOWN) == len(set(KNOWN))
    marked = {fault for fault, _ in marked_tests()}
    assert marked == set(KNOWN), f"without a test: {set(KNOWN) - marked}; unknown: {marked - set(KNOWN)}"


def test_the_page_is_written_from_the_marks() -> None:
    assert PAGE.read_text(encoding="utf-8") == fault_page(), "write it again: python -m tests.faults.table"
