"""``import deep_ep`` gives this library: the same modules, one set of classes, in this and in other interpreters."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import pkgutil
import subprocess
import sys
import types

import pytest
from packaging.version import Version

import deep_ep_py
from deep_ep_py import EPArgumentError, EPError, compat

ALIAS = "deep_ep_for_this_test"  # tests in this process leave the real name alone


@pytest.fixture
def alias():
    before = list(sys.meta_path)
    compat.install(ALIAS)
    yield ALIAS
    compat.uninstall(ALIAS)
    assert sys.meta_path == before and not aliased()


def aliased():
    return sorted(name for name in sys.modules if name.partition(".")[0] == ALIAS)


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["", ".utils", ".utils.event", ".buffer", ".elastic", ".event", ".backends.shm"])
def test_modules_are_the_same_objects(alias, module):
    ours = importlib.import_module("deep_ep_py" + module)
    spec, name = ours.__spec__, ours.__name__
    assert importlib.import_module(alias + module) is ours
    assert ours.__spec__ is spec and ours.__name__ == name == spec.name == "deep_ep_py" + module


def test_there_is_one_set_of_classes(alias):
    known: dict[str, object] = {}
    exec(f"from {alias} import Buffer, ElasticBuffer, EPHandle, Config, EventHandle, EventOverlap, topk_idx_t", known)
    exec(f"from {alias}.utils import EventHandle as H, EventOverlap as O", known)
    exec(f"from {alias}.utils.event import EventOverlap as P", known)
    assert known["Buffer"] is deep_ep_py.Buffer and known["EPHandle"] is deep_ep_py.EPHandle
    assert known["H"] is known["EventHandle"] is deep_ep_py.EventHandle
    assert known["O"] is known["P"] is known["EventOverlap"] is deep_ep_py.EventOverlap


def test_utils_is_there_after_a_plain_import(alias):
    assert importlib.import_module(alias).utils.EventOverlap is deep_ep_py.EventOverlap


def test_every_module_of_a_walk_is_ours(alias):
    package = importlib.import_module(alias)
    names = [m.name for m in pkgutil.walk_packages(package.__path__, alias + ".") if not m.name.endswith("__main__")]
    assert len(names) > 20
    for name in names:
        assert importlib.import_module(name) is sys.modules["deep_ep_py" + name[len(alias) :]]


@pytest.mark.parametrize("module", ["", ".utils", ".utils.event", ".buffer"])
def test_specs_are_valid_before_and_after_the_import(alias, module):
    ours = importlib.import_module("deep_ep_py" + module)
    before = importlib.util.find_spec(alias + module)
    assert before is not None and before.name == alias + module and before.origin == ours.__spec__.origin
    assert before.submodule_search_locations == ours.__spec__.submodule_search_locations
    importlib.import_module(alias + module)
    assert importlib.util.find_spec(alias + module) is ours.__spec__


def test_what_is_not_there_is_not_found(alias):
    assert importlib.util.find_spec(f"{alias}.no_such_module") is None
    with pytest.raises(ModuleNotFoundError, match=f"{alias}.no_such_module"):
        importlib.import_module(f"{alias}.no_such_module")
    with pytest.raises(ImportError, match="HybridEPBuffer"):  # how clients find out what there is
        exec(f"from {alias} import HybridEPBuffer")


def test_nothing_is_imported_before_it_is_asked_for(alias):
    assert aliased() == []
    importlib.import_module(alias)
    assert aliased() == [alias]
    importlib.import_module(f"{alias}.backends.shm")
    assert aliased() == [alias, f"{alias}.backends", f"{alias}.backends.shm"]


def test_install_is_idempotent_across_a_reload(alias):
    before = list(sys.meta_path)
    importlib.import_module(f"{alias}.buffer")
    compat.install(alias)
    importlib.reload(compat)
    compat.install(alias)
    assert sys.meta_path == before
    compat.uninstall(alias)
    compat.uninstall(alias)
    assert importlib.util.find_spec(alias) is None
    compat.install(alias)
    assert importlib.import_module(alias) is deep_ep_py


def test_reload_keeps_the_modules(alias):
    package, buffer = importlib.import_module(alias), deep_ep_py.Buffer
    assert importlib.reload(package) is deep_ep_py
    assert deep_ep_py.__spec__.name == "deep_ep_py" and deep_ep_py.Buffer is buffer
    assert sys.modules[alias] is sys.modules["deep_ep_py"] is deep_ep_py


def test_pickles_by_either_name_give_the_same_class(alias):
    config = pickle.loads(pickle.dumps(importlib.import_module(alias).Config(8)))
    assert type(config) is deep_ep_py.Config and config.num_sms == 8
    assert pickle.loads(f"c{alias}.utils.event\nEventOverlap\n.".encode()) is deep_ep_py.EventOverlap


@pytest.mark.parametrize("module", ["", ".utils"])
@pytest.mark.parametrize("other", [types.ModuleType("another"), None], ids=["another", "blocked"])
def test_another_library_of_that_name_is_refused(monkeypatch, module, other):
    monkeypatch.setitem(sys.modules, ALIAS + module, other)
    before = list(sys.meta_path)
    with pytest.raises(EPError, match=f"{ALIAS}{module} is imported already .*before anything imports {ALIAS}"):
        compat.install(ALIAS)
    assert sys.meta_path == before and sys.modules[ALIAS + module] is other


@pytest.mark.parametrize("name", ["deep_ep_py", "a.b", "", "1", None])
def test_names_that_cannot_be_aliases_are_refused(name):
    with pytest.raises(EPArgumentError, match="name"):
        compat.install(name)


def test_versions(alias, tmp_path, monkeypatch):
    package = importlib.import_module(alias)
    assert Version(package.__version__) and package.__version__ == deep_ep_py.__version__
    info = tmp_path / "deep_ep_py-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deep_ep_py\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    for asked in (alias, alias.replace("_", "-"), "deep_ep_py"):
        assert importlib.metadata.version(asked) == "9.8.7"
    listed = [d for d in importlib.metadata.distributions() if d.version == "9.8.7"]
    assert len(listed) == 1, "the alias shows up as a distribution of its own"
    compat.uninstall(alias)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(alias)


# --- in other interpreters --------------------------------------------------------------------------------------------

# What a program can see of how it was started; then, as ranks do, what a spawned process sees.
PROGRAM = """
import importlib.util, json, sys
import multiprocessing

def look():
    import __main__
    main = {name: str(getattr(__main__, name, "-")) for name in ("__file__", "__package__", "__name__")}
    spec = getattr(__main__, "__spec__", None)
    return {"argv": sys.argv, "path": sys.path[0], "spec": spec and spec.name, **main}

def child(pipe):
    import deep_ep
    from deep_ep.utils.event import EventOverlap
    import deep_ep_py
    pipe.send(deep_ep is deep_ep_py and EventOverlap is deep_ep_py.EventOverlap)

kept = object()
if __name__ == "__main__":
    assert sys.modules["__main__"].kept is kept
    found = look()
    found["deep_ep"] = importlib.util.find_spec("deep_ep") is not None
    if "spawn" in sys.argv:
        import deep_ep, deep_ep_py
        assert deep_ep is deep_ep_py
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=child, args=(there,))
        process.start()
        there.close()
        found["spawned"] = here.recv()
        process.join()
    print(json.dumps(found))
    sys.exit(7)
"""


def python(*arguments, cwd, path=()):
    path = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd, env=env)


@pytest.fixture
def programs(tmp_path):
    (tmp_path / "folder" / "package").mkdir(parents=True)
    for name in ("program.py", "folder/program.py", "folder/package/__main__.py", "folder/package/__init__.py"):
        (tmp_path / name).write_text("" if name.endswith("__init__.py") else PROGRAM)
    (tmp_path / "link.py").symlink_to(tmp_path / "folder" / "program.py")
    return tmp_path


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        (".", ["program.py", "a", "-h", "--", "--as-deep-ep", "-m"]),
        (".", ["link.py", "b"]),
        ("folder", ["-m", "program", "-x"]),
        ("folder", ["-m", "package", "c"]),
    ],
    ids=["arguments", "link", "module", "package"],
)
def test_run_is_as_python_runs_it(programs, where, arguments):
    plain = python(*arguments, cwd=programs / where)
    ours = python("-m", "deep_ep_py", "run", *arguments, cwd=programs / where)
    assert plain.returncode == ours.returncode == 7, plain.stderr + ours.stderr
    assert json.loads(ours.stdout) == json.loads(plain.stdout)
    assert ours.stderr == ""


@pytest.mark.parametrize("arguments", [["program.py"], ["-m", "program"]], ids=["file", "module"])
def test_run_as_deep_ep_reaches_spawned_processes(programs, arguments):
    done = python("-m", "deep_ep_py", "run", "--as-deep-ep", *arguments, "spawn", cwd=programs)
    assert done.returncode == 7 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    assert found["deep_ep"] and found["spawned"] and found["argv"][1:] == ["spawn"]
    assert found["path"] == str(programs)


def test_run_reports_what_goes_wrong(programs):
    (programs / "raises.py").write_text("raise LookupError('of the program')\n")
    raised = python("-m", "deep_ep_py", "run", "raises.py", cwd=programs)
    assert raised.returncode == 1 and raised.stderr.endswith("LookupError: of the program\n")
    assert 'raises.py", line 1' in raised.stderr
    for arguments in (["nothing.py"], ["-m", "nothing"]):
        missing = python("-m", "deep_ep_py", "run", *arguments, cwd=programs)
        assert missing.returncode == 2 and "cannot run 'nothing" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.processes
def test_run_as_deep_ep_under_torchrun(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import sys, torch, torch.distributed as dist, deep_ep\n"
        "dist.init_process_group('gloo')\n"
        "buffer = deep_ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=4)\n"
        "x, topk_idx = torch.ones(2, 8), torch.tensor([[0], [1]])\n"
        "recv_x, _, _, handle, _ = buffer.dispatch(x, topk_idx, num_experts=2)\n"
        "sys.stdout.write(f'rows {recv_x.shape[0]} {sys.argv[1:]}\\n')\n"  # one write: ranks share the pipe
        "dist.destroy_process_group()\n"
    )
    done = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "deep_ep_py", "run", "--as-deep-ep", "rank.py", "--flag", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows 2 ['--flag']") == 2


def test_import_path_serves_interpreters_without_a_call(tmp_path):
    code = (
        "import importlib.util, sys; assert importlib.util.find_spec('deep_ep')\n"
        "from deep_ep.utils import EventHandle; import deep_ep, deep_ep.buffer, deep_ep_py\n"
        "assert deep_ep is deep_ep_py and deep_ep.buffer is deep_ep_py.buffer\n"
        "assert EventHandle is deep_ep_py.EventHandle and deep_ep.__spec__.name == 'deep_ep_py'\n"
        "import deep_ep_py.compat as c; c.install(); c.uninstall(); assert 'deep_ep' not in sys.modules\n"
    )
    done = python("-c", code, cwd=tmp_path, path=[compat.import_path()])
    assert done.returncode == 0 and done.stderr == "", done.stderr
