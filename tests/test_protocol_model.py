"""The protocol's Promela model, checked exhaustively: the right one holds, every planted fault is found. A search is a
function of its inputs, so it is run where pytest's cache has no result for them."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parent.parent / "csrc" / "protocol" / "model"
COMPILER = shutil.which("cc") or shutil.which("gcc")
MAX_DEPTH = 2000
MEMORY_MIB = 4000
TIMEOUT_S = 600
INCOMPLETE = ("max search depth too small", "Search not completed", "out of memory", "aborted", "truncated")

pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed (Debian: apt install spin)"),
    pytest.mark.timeout(TIMEOUT_S),  # an exhaustive search took up to 45 s on a shared core
]


@dataclass(frozen=True)
class Result:
    """What the verifier said: errors found, states stored, what it never reached, and its whole text."""

    errors: int
    states: int
    unreached: frozenset[tuple[str, str]]
    text: str


CONFIGURATIONS = {
    "plain": ("-DBARRIERS=1",),
    "failed": ("-DFAILED=2", "-DBARRIERS=1"),
    "growth": ("-DSMALL=2",),
    "failed_and_growth": ("-DFAILED=1", "-DSMALL=1"),
    "async": ("-DASYNC=1",),
    "interrupt": ("-DINTERRUPT=1",),
    "death": ("-DDEATH=1",),
}

# The plant, the configuration that brings it out, and what the verifier must say.
PLANTS = {
    "no_release": (("-DPLANT_NO_RELEASE",), r"assertion violated.*readers\["),
    "no_release_async": (("-DPLANT_NO_RELEASE", "-DASYNC=1"), r"assertion violated.*readers\["),
    "one_slot": (("-DPLANT_ONE_SLOT",), r"assertion violated.*(taken\[|slot_seq\[)"),
    "early_offer": (("-DPLANT_EARLY_OFFER", "-DASYNC=1"), r"assertion violated.*readers\["),
    "no_catch_up": (("-DPLANT_NO_CATCH_UP", "-DFAILED=2"), r"assertion violated.*slot_seq\["),
    "no_last_look": (("-DPLANT_NO_LAST_LOOK", "-DINTERRUPT=1"), r"assertion violated.*spoiled"),
    "no_quarantine": (("-DPLANT_NO_QUARANTINE", "-DINTERRUPT=1"), r"assertion violated.*writers\["),
    "deaf_to_death": (("-DPLANT_DEAF_TO_DEATH", "-DDEATH=1"), r"invalid end state"),
    "deaf_to_poison": (("-DPLANT_DEAF_TO_POISON", "-DINTERRUPT=1"), r"invalid end state"),
}


def verify(directory: Path, macros: tuple[str, ...], optimise: str) -> str:
    """Generate, compile and run the verifier for one set of macros; returns what it said."""
    assert COMPILER is not None, "spin needs a C compiler: neither cc nor gcc was found"
    for source in MODEL.glob("*.pml"):
        shutil.copy(source, directory)
    commands = (
        ("spin", "-a", *macros, "protocol.pml"),
        (COMPILER, optimise, "-w", "-DSAFETY", f"-DMEMLIM={MEMORY_MIB}", "-o", "pan", "pan.c"),
        ("./pan", f"-m{MAX_DEPTH}", "-w23"),
    )
    for command in commands:
        done = subprocess.run(
            command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}"
    return done.stdout


def fingerprint(*settings: object) -> str:
    """Of all that a search depends on: the model, this file, spin."""
    spin = subprocess.run(["spin", "-V"], capture_output=True, text=True, check=True).stdout
    files = [*sorted(MODEL.glob("*.pml")), Path(__file__)]
    return hashlib.sha256(repr((spin, settings, [file.read_bytes() for file in files])).encode()).hexdigest()


@pytest.fixture
def run_model(pytestconfig: pytest.Config, tmp_path: Path) -> Callable[..., Result]:
    """The search's result: of this run, or of an earlier one with the same inputs, whose words pytest's cache kept."""

    def run(macros: tuple[str, ...], optimise: str) -> Result:
        assert pytestconfig.cache is not None
        place = f"protocol_model/{fingerprint(macros, optimise)}"
        text: str | None = pytestconfig.cache.get(place, None)
        if text is None:
            text = verify(tmp_path, macros, optimise)
            # A search that ended without an answer, for want of memory, is repeated.
            if result_of(text).errors > 0 or not any(sign in text for sign in INCOMPLETE):
                pytestconfig.cache.set(place, text)
        return result_of(text)

    return run


def result_of(text: str) -> Result:
    errors = re.search(r"errors: (\d+)", text)
    states = re.search(r"(\d+) states, stored", text)
    assert errors and states, text
    # A statement is also listed with the guard of its `unless`; only the statement itself counts.
    unreached = re.findall(r"(\w+\.pml:\d+), state \d+, \"(.*)\"", text)
    unreached_set = frozenset(item for item in unreached if "!(alive[me])" not in item[1])
    return Result(int(errors[1]), int(states[1]), unreached_set, text)


@pytest.fixture(scope="module")
def checked() -> dict[str, Result]:
    """Results of the configurations run so far, so that the test of reach need not run them again."""
    return {}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_protocol_holds(name: str, run_model: Callable[..., Result], checked: dict[str, Result]) -> None:
    # More optimisation costs the compiler more than it saves the search, and a plant is found after few states.
    result = checked[name] = run_model(CONFIGURATIONS[name], "-O1")
    assert result.errors == 0, result.text
    for sign in INCOMPLETE:
        assert sign not in result.text, result.text
    assert "Full statespace search" in result.text
    assert re.search(r"assertion violations\s+\+", result.text)
    assert re.search(r"invalid end states\s+\+", result.text)
    assert result.states > 100_000, f"only {result.states} states: the model has lost its behaviour"


def test_every_statement_is_reached(checked: dict[str, Result]) -> None:
    """A statement that no configuration reaches proves nothing."""
    if checked.keys() != CONFIGURATIONS.keys():
        pytest.skip("needs the results of every configuration of test_protocol_holds")
    never = frozenset.intersection(*(result.unreached for result in checked.values()))
    assert not never, sorted(never)


@pytest.mark.parametrize("name", PLANTS)
def test_planted_fault_is_found(name: str, run_model: Callable[..., Result]) -> None:
    macros, verdict = PLANTS[name]
    result = run_model(macros, "-O0")
    assert result.errors > 0, f"{name} was not found:\n{result.text}"
    assert re.search(rf"^pan:1: {verdict}", result.text, re.MULTILINE), result.text
