"""Plain words: docstrings begin with a verb, and local names say what they hold."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlhf"
ROOMS = sorted({file.relative_to(ROOT).parts[0] for file in ROOT.rglob("*.py")})
VERBS = set(
    """
    Accept Adapt Add Adopt Agree Allow Announce Answer Append Apply Ascend Ask Assert Assign Attach Audit Average
    Begin Bound Bring Build Call Cap Carry Catch Center Change Check Choose Clear Clip Close Collect Combine Compare
    Compute Condition Connect Convert Copy Correct Count Create Cut Deal Decide Declare Delete Denoise Describe
    Detach Detect Divide Do Draw Drop Dump Encode End Ensure Enter Estimate Evaluate Exclude Execute Expand Explain
    Export Extract Feed Fill Filter Find Finish Fit Flip Flush Follow Forget Format Forward Freeze Gather Generate
    Get Give Go Group Hand Handle Hash Hold Import Initialise Insert Install Iterate Join Keep Label Leave Let Limit
    Link List Load Lock Log Look Lower Make Map Mark Match Measure Merge Mix Move Name Normalise Note Offer Open
    Order Pack Pad Parse Pass Place Plan Plot Poll Prepare Print Prompt Propose Publish Put Raise Rank Read Rebuild
    Receive Record Reduce Refuse Register Reject Release Remember Remove Rename Render Repeat Replace Report Require
    Reset Resolve Restore Resume Return Round Run Sample Save Say Scale Score Search Select Send Serve Set Shard
    Shift Show Shuffle Silence Simulate Skip Slice Smooth Sort Split Stand Start Stop Store Strip Subtract Sum
    Summarise Switch Take Tell Test Tokenize Train Translate Treat Trim Truncate Try Turn Undo Unite Unpack Update
    Use Validate Verify Vote Wait Walk Warn Weigh Whiten Wrap Write Yield
    """.split()  # noqa: SIM905
)
UNCLEAR = {"how", "own", "found", "said", "astray", "strange", "present", "pool", "turned_round", "climb", "come_back"}


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / room]


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_a_verb(room: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}"
        for file in files(room)
        for node in functions(ast.parse(file.read_text(encoding="utf-8")))
        if (text := ast.get_docstring(node)) and text.split()[0] not in VERBS
    ]
    assert not wrong, f"{len(wrong)} docstrings begin with no verb:\n" + "\n".join(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_names_say_what_they_hold(room: str) -> None:
    wrong = []
    for file in files(room):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = None
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = node.name
            if name in UNCLEAR:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {name}")
    assert not wrong, f"{len(wrong)} names that say nothing:\n" + "\n".join(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_takes_more_than_seven_arguments_by_place(room: str) -> None:
    wrong = []
    for file in files(room):
        for node in functions(ast.parse(file.read_text(encoding="utf-8"))):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            if len(arguments) > 7:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} takes {len(arguments)}")
    assert not wrong, "\n".join(wrong)
