"""tmp"""
from pathlib import Path
def write_report(run: Path) -> Path:
    """tmp"""
    return run / "report.html"
