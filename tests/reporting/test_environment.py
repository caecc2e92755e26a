from memo_runtime.reporting import environment


def wanted(**changes):
    return environment._Wanted(**{"distribution": "numpy", "module": "numpy", **changes})


def test_every_needed_package_loads_here():
    broken = [package for package in environment.packages() if package.needed and not package.loads]
    assert broken == []


def test_versions_and_details():
    found = {package.name: package for package in environment.packages()}
    assert found["torch"].version
    assert found["torch"].detail.startswith("built for")
    assert found["pulp"].detail.startswith("solvers: ")


def test_a_package_that_is_not_there_names_its_extra():
    package = environment._examine(wanted(distribution="no-such-thing", module="no_such_thing", extra="hf"))
    assert not package.loads
    assert not package.needed
    assert package.version is None
    assert package.detail == "not installed; pip install 'memo-runtime[hf]'"


def test_a_package_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_thing.py").write_text("raise OSError('libmissing.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    package = environment._examine(wanted(module="broken_thing"))
    assert not package.loads
    assert package.version
    assert package.detail == "OSError: libmissing.so: cannot open"


def test_system_names_python_and_processors():
    system = environment.system()
    assert system.python.startswith("3.")
    assert system.processors >= 1
