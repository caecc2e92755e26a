"""The C++ tests, with memory errors, undefined behaviour and data races made visible."""

import subprocess

import pytest

from tests.native.building import HERE, compile_together, compiler, core_sources, fake_driver


def supported(folder, flags):
    source = folder / "probe_source.cpp"
    source.write_text("int main() { return 0; }\n")
    target = folder / "probe"
    if compile_together([source], target, *flags).returncode != 0:
        return False
    return subprocess.run([str(target)], check=False).returncode == 0


# Without optimisation where that compiles in half the time.
@pytest.mark.parametrize(
    ("kind", "level"), [("address,undefined", "-O0"), pytest.param("thread", "-O1", marks=pytest.mark.slow)]
)
def test_the_core_is_clean(tmp_path, kind, level):
    flags = [f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-g1"]
    if compiler() is None or not supported(tmp_path, flags):
        pytest.skip(f"needs a C++ compiler with -fsanitize={kind}")
    driver = fake_driver(tmp_path, *flags, level)
    target = tmp_path / "core_test"
    built = compile_together([*core_sources(), HERE / "core_test.cpp"], target, level, "-Werror", *flags)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(target), str(driver)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "ok\n"
