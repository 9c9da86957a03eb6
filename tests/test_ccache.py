"""Compiling: a compiler that is missing, broken or strange, and a cache that is not to be trusted."""

import ctypes
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gradkit.backends import ccache

FOUND = ccache.compiler(os.environ.get("CC", ""), os.environ.get("PATH", ""))
CC = "" if isinstance(FOUND, str) else shlex.join(FOUND[0])
pytestmark = pytest.mark.skipif(ccache.why_not() is not None, reason=f"no C compiler: {ccache.why_not()}")
MAPS = Path("/proc/self/maps")


def answer(n, note):
    """C of a library whose `run` writes n to where the job points; the note makes the text a new one."""
    return f"#include <stdint.h>\n/* {note} */\nvoid run(const int64_t *job) {{ *(int64_t *)job[0] = {n}; }}\n"


def ask(library):
    out = ctypes.c_int64(0)
    library.run(ctypes.addressof(ctypes.c_int64(ctypes.addressof(out))))
    return out.value


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradkit"


@pytest.fixture
def wrapped(tmp_path, monkeypatch):
    """Make CC a script around the real compiler; returns the file to which it appends a line for each call."""

    def write(before):
        script = tmp_path / "my cc"
        script.write_text(f'#!/bin/sh\necho call "$@" >> "{tmp_path}/calls"\n{before}\nexec {CC} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CC", f"'{script}'")
        return tmp_path / "calls"

    return write


def flags():
    return ccache.compiler(os.environ["CC"], os.environ["PATH"])[1]


def compiled(calls):
    return sum("--version" not in line for line in calls.read_text().splitlines())


def libraries(home):
    return sorted(home.glob("*.so")) if home.exists() else []


def test_without_a_compiler_it_says_so(monkeypatch, home):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C compiler (cc, gcc, clang) was found" in ccache.why_not()
    with pytest.raises(ccache.NoCompiler, match="no C compiler"):
        ccache.build(answer(1, home))


def test_a_missing_cc_is_named(monkeypatch, home):
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert "CC='no-such-compiler -O1' was not found" in ccache.why_not()
    monkeypatch.setenv("CC", "cc 'half a quotation")
    assert "can't be read" in ccache.why_not()


@pytest.mark.parametrize("script", ["echo note >&2; echo 'x.c:1: fatal error: the disk is sad' >&2; exit 3", "exit 3"])
def test_a_failing_compiler_is_the_reason(wrapped, home, script):
    wrapped(script)
    reason = ccache.why_not()
    assert "failed with 3" in reason and ("the disk is sad" in reason or "no message" in reason) and len(reason) < 400
    with pytest.raises(ccache.NoCompiler) as e:
        ccache.build(answer(1, home))
    assert str(e.value) == reason


def test_the_first_error_of_a_bad_text_is_shown(home):
    with pytest.raises(ccache.NoCompiler, match="failed with .*error.*nonsense") as e:
        ccache.build("void run(void) { nonsense; }" + "int x[] = {1};" * 10_000)
    assert len(str(e.value)) < 400 and {file.suffix for file in home.iterdir()} <= {".c", ".so"}


def test_half_a_library_is_not_left_behind(home, monkeypatch):
    def breaks_off(command, text=""):
        Path(command[command.index("-o") + 1]).write_text("half")
        raise ccache.NoCompiler("killed")

    ccache.version(tuple(FOUND[0]))  # known before the compiler breaks
    monkeypatch.setattr(ccache, "call", breaks_off)
    with pytest.raises(ccache.NoCompiler, match="killed"):
        ccache.build(answer(3, home))
    assert [file.suffix for file in home.iterdir()] == [".c"]


def test_cc_may_hold_arguments(monkeypatch, home):
    monkeypatch.setenv("CC", f"{CC} -DANSWER='40 + 2'")
    assert ask(ccache.build(answer("ANSWER", home))) == 42


def test_another_cc_is_another_library(monkeypatch, home):
    for n in (1, 2):
        monkeypatch.setenv("CC", f"{CC} -DANSWER={n}")
        assert ask(ccache.build(answer("ANSWER", home))) == n


@pytest.mark.parametrize("refused", ccache.WANTED)
def test_a_refused_flag_is_dropped_alone(wrapped, home, refused):
    wrapped(f'for x in "$@"; do if [ "$x" = "{refused}" ]; then echo error: unknown >&2; exit 1; fi; done')
    assert ask(ccache.build(answer(7, home))) == 7
    assert set(flags()) == set(FOUND[1]) - {refused}


def test_a_compiler_that_contracts_is_not_used(wrapped, home):
    wrapped('for x in "$@"; do if [ "$x" = "-ffp-contract=off" ]; then echo error: unknown >&2; exit 1; fi; done')
    assert "error: unknown" in ccache.why_not()


OPENMP_LOOP = """#include <stdint.h>
void run(const int64_t *job) {
  int64_t sum = 0;
  #pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < 100; i++) sum += i;
  *(int64_t *)job[0] = sum;
}
"""
on_linux = pytest.mark.skipif(not MAPS.exists(), reason="no /proc/self/maps to read what is loaded")


@on_linux
def test_openmp_is_torchs_own_copy(home):
    library = ccache.build(OPENMP_LOOP)
    assert ask(library) == 4950
    loaded = {line.split()[-1] for line in MAPS.read_text().splitlines() if re.search(r"/lib(gomp|omp|iomp)", line)}
    assert len(loaded) == 1, loaded
    if "libgomp" in loaded.pop() and "Free Software Foundation" in ccache.version(tuple(FOUND[0])):
        assert library.openmp  # gcc's libgomp is the one that torch's wheels bring


@on_linux
def test_a_second_openmp_runtime_is_never_loaded(wrapped, tmp_path, home):
    other = tmp_path / "libgomp.so.77"
    subprocess.run([*FOUND[0], "-shared", "-x", "c", "-", "-o", other], input=b"int other_runtime;", check=True)
    wrapped(
        'for x in "$@"; do shift; case "$x" in -fopenmp) x="-Wl,--no-as-needed";; esac; set -- "$@" "$x"; done\n'
        f'case "$*" in *no-as-needed*) set -- "$@" -x none "{other}";; esac'
    )
    library = ccache.build(OPENMP_LOOP)
    assert not library.openmp and ask(library) == 4950
    assert "-fopenmp" not in flags() and "libgomp.so.77" not in MAPS.read_text()


def test_the_cache_saves_the_compiler(wrapped, home):
    calls = wrapped("")
    assert ask(ccache.build(answer(5, home))) == 5
    before = compiled(calls)
    assert ccache.build(answer(5, home)) is ccache.build(answer(5, home))  # in one process
    ccache._build.cache_clear()
    ccache.compiler.cache_clear()
    assert ask(ccache.build(answer(5, home))) == 5  # as in the next one
    assert compiled(calls) == before and before >= 2
    assert ask(ccache.build(answer(6, home))) == 6
    assert compiled(calls) == before + 1


def test_the_text_stands_beside_its_library_in_a_private_folder(home):
    ccache.build(answer(8, home))
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    texts = [file for file in home.glob("*.c") if file.read_text() == answer(8, home)]
    assert len(texts) == 1 and list(home.glob(f"{texts[0].stem}.*.so"))
    assert {file.suffix for file in home.iterdir()} == {".c", ".so"}


SPOILT = [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"corrupted", lambda b: b"x" * 99]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_library_is_made_again(home, spoil):
    source = answer(9, home)
    ccache.build(source)
    (text,) = (file for file in home.glob("*.c") if file.read_text() == source)
    (made,) = home.glob(f"{text.stem}.*.so")
    good = made.read_bytes()
    made.unlink()  # what is mapped must not change under this process's feet
    made.write_bytes(spoil(good))
    ccache._build.cache_clear()
    assert ask(ccache.build(source)) == 9
    assert any(ccache.digest(file) == file.name.split(".")[1] for file in home.glob(f"{text.stem}.*.so"))


def assert_works_without(home):
    """It compiles, and leaves nothing in that folder."""
    before = set(home.iterdir()) if home.is_dir() else set()
    assert ask(ccache.build(answer(10, home))) == 10
    assert (set(home.iterdir()) if home.is_dir() else set()) == before


def test_a_read_only_cache_is_read_but_not_needed(home, monkeypatch):
    kept = answer(11, home)
    ccache.build(kept)
    real = tempfile.mkstemp

    def refuse(*args, dir=None, **more):  # root writes where modes forbid it, so modes would not test this
        if Path(dir or "/") == home:
            raise OSError(30, "Read-only file system")
        return real(*args, dir=dir, **more)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert_works_without(home)
    ccache._build.cache_clear()
    monkeypatch.setattr(ccache, "make", None)
    assert ask(ccache.build(kept)) == 11


def test_a_cache_that_is_no_folder_is_not_needed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_works_without(tmp_path / "file" / "gradkit")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_not_used(home, mode):
    home.mkdir(parents=True)
    home.chmod(mode)
    with pytest.raises(PermissionError, match="written by others"):
        ccache.folder()
    assert_works_without(home)


def test_a_folder_of_somebody_else_is_not_used(home, monkeypatch):
    home.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="somebody else"):
        ccache.folder()
    assert_works_without(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link or a folder to somebody else")
@pytest.mark.parametrize("theirs", ["link", "target"])
def test_a_link_needs_to_be_ours_at_both_ends(tmp_path, home, theirs):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    home.parent.mkdir()
    home.symlink_to(target)
    assert ccache.folder() == home
    os.chown(home, 12345, 12345, follow_symlinks=theirs == "target")
    with pytest.raises(PermissionError, match="somebody else"):
        ccache.folder()
    assert_works_without(target)


def test_a_relative_cache_home_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ccache.folder() == tmp_path / "home" / ".cache" / "gradkit"


EIGHT = """
import ctypes, multiprocessing, sys
from gradkit.backends import ccache
def child(start, source):
    start.wait()
    out = ctypes.c_int64(0)
    ccache.build(source).run(ctypes.addressof(ctypes.c_int64(ctypes.addressof(out))))
    sys.exit(0 if out.value == 77 else 1)
fork = multiprocessing.get_context("fork")
start = fork.Barrier(8)
children = [fork.Process(target=child, args=(start, sys.argv[1])) for _ in range(8)]
[c.start() for c in children]
[c.join() for c in children]
sys.exit(sum(c.exitcode != 0 for c in children))
"""


def test_eight_processes_may_compile_one_text_at_once(home):
    done = subprocess.run([sys.executable, "-c", EIGHT, answer(77, home)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.suffix for file in home.iterdir()} == {".c", ".so"}  # nothing half made is left
    assert all(ccache.digest(file) == file.name.split(".")[1] for file in libraries(home))
