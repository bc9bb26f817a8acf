"""Where compiled kernels are kept: a folder that nobody else can write, and files that may be damaged."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.registry import CPUDispatcher

import mfdist
from mfdist.kernels import disk_cache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The choice of a folder made anew, with a home and a temporary folder of the test's own."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir(mode=0o700)
    temporary.mkdir()
    temporary.chmod(0o1777)
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(disk_cache.tempfile, "tempdir", str(temporary))
    return home, temporary


def chosen():
    return Path(disk_cache.folder.__wrapped__())


def test_the_folder_is_the_users_own(fresh, monkeypatch):
    home, temporary = fresh
    before = os.umask(0o002)
    try:
        assert chosen() == home / ".cache/mfdist"
    finally:
        os.umask(before)
    for path in (home / ".cache", home / ".cache/mfdist"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert chosen() == home / "xdg/mfdist"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert chosen() == home / ".cache/mfdist"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(temporary / "numba"))
    assert chosen() == temporary / "numba/mfdist"


def break_mode(path):
    path.chmod(0o777)


def break_owner(path):
    os.chown(path, 12345, 12345)


def break_parent(path):
    path.parent.chmod(0o777)


def break_by_link(path):
    shutil.rmtree(path)
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("damage", [break_mode, break_owner, break_parent, break_by_link])
def test_a_folder_that_others_can_write_is_not_taken(fresh, damage):
    if damage is break_owner and os.getuid() != 0:
        pytest.skip("needs root, to give a folder to another user")
    _, temporary = fresh
    damage(chosen())
    second = chosen()
    assert second == temporary / f"mfdist-{os.getuid()}"
    if damage is break_parent:  # the temporary folder is open to all, but nobody can rename what is not theirs
        temporary.chmod(0o777)
    else:
        damage(second)
    private = chosen()
    assert private.parent == temporary and private.name.startswith("mfdist-kernels-")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def test_every_compiled_function_of_the_package_is_kept_there():
    found = 0
    for module in pkgutil.walk_packages(mfdist.__path__, "mfdist."):
        if module.name.endswith("__main__") or module.name.startswith("mfdist.jobs") or "gpu" in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, CPUDispatcher) and value.targetoptions.get("inline") is None:
                assert isinstance(value._cache, disk_cache._Kept), (module.name, value)
                assert Path(value._cache.cache_path).parent == Path(disk_cache.folder())
                found += 1
    assert found > 50


CHAIN = """
import numpy as np
from mfdist.data.shuffle import _chain
print(_chain(np.uint64(1), np.uint64(7)))
print(sum(_chain.stats.cache_hits.values()), sum(_chain.stats.cache_misses.values()))
"""


def run(folder, source=ROOT):
    """The result of a small kernel in a new process, and its (hits, misses) in the cache at ``folder``."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", CHAIN], env=env, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    result, counts = done.stdout.splitlines()
    return result, tuple(map(int, counts.split()))


def damaged(content, how):
    if how == "empty":
        return b""
    if how == "cut":
        return content[: len(content) // 2]
    if how == "zeros":
        return bytes(len(content))
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("pattern", ["*.nbc", "*.nbi"])
@pytest.mark.parametrize("how", ["empty", "cut", "zeros", "bit"])
def test_a_damaged_file_is_as_if_it_were_not_there_and_is_replaced(tmp_path, how, pattern):
    content = {"code": b"x" * 500}
    files = disk_cache._Files(str(tmp_path), "kernel", "sources")
    files.save("key", content)
    assert files.load("key") == content
    (path,) = tmp_path.glob(pattern)
    path.write_bytes(damaged(path.read_bytes(), how))
    assert files.load("key") is None or (how, pattern) == ("bit", "*.nbi")
    files.save("key", content)
    assert files.load("key") == content


def test_a_kernel_whose_files_are_empty_is_compiled_again(tmp_path):
    folder = tmp_path / "cache"
    result, counts = run(folder)
    assert counts == (0, 1)
    for path in [*(folder / "mfdist").rglob("*.nbc"), *(folder / "mfdist").rglob("*.nbi")]:
        path.write_bytes(b"")
    assert run(folder) == (result, (0, 1))
    assert run(folder) == (result, (1, 0))


def test_checkouts_of_the_same_source_share_and_others_do_not(tmp_path):
    folder = tmp_path / "cache"
    result, _ = run(folder)
    shutil.copytree(ROOT / "mfdist", tmp_path / "copy/mfdist", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(folder, tmp_path / "copy") == (result, (1, 0))
    with open(tmp_path / "copy/mfdist/kernels/grouping.py", "a") as stream:
        stream.write("\n# changed\n")
    assert run(folder, tmp_path / "copy") == (result, (0, 1))
    old = next((folder / "mfdist").glob("data-*"))
    os.utime(old, (0, 0))
    with open(tmp_path / "copy/mfdist/kernels/grouping.py", "a") as stream:
        stream.write("# again\n")
    run(folder, tmp_path / "copy")
    assert not old.exists() and len(list((folder / "mfdist").glob("data-*"))) >= 2


def test_two_processes_that_compile_other_forms_at_one_moment_do_not_mix_them_up(tmp_path, monkeypatch):
    first, second = (disk_cache._Files(str(tmp_path), "f", "stamp") for _ in range(2))
    keep = first._save_data

    def late(name, data):
        second.save("floats", "for floats")
        keep(name, data)

    with monkeypatch.context() as patched:  # both have read the index before either writes it
        patched.setattr(disk_cache._Files, "_load_index", lambda self: {})
        patched.setattr(first, "_save_data", late)
        first.save("integers", "for integers")
    assert [first.load(key) for key in ("integers", "floats")] in (["for integers", None], [None, "for floats"])
    first.save("integers", "for integers")
    second.save("floats", "for floats")
    assert [first.load(key) for key in ("integers", "floats")] == ["for integers", "for floats"]


CLOSURES = """
import numpy as np
from mfdist.kernels import dot_tiles, top_n
from mfdist.kernels.disk_cache import _named
print(_named(top_n.search_by_floats), _named(top_n.marks_of_floats), _named(3), sep="\\n")
print(top_n.search_by_floats._cache._index_key("signature", type("C", (), {"magic_tuple": lambda self: ()})()))
"""


def test_what_a_kernel_takes_from_around_it_has_one_name_in_all_processes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run([sys.executable, "-c", CLOSURES], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert said[0].stdout == said[1].stdout
    kernel, marks, number, _ = said[0].stdout.splitlines()
    assert "_search" in kernel and marks in kernel and marks.startswith("mfdist.kernels.dot_tiles.") and number == "3"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a folder that cannot be written")
def test_a_new_folder_begins_with_what_an_image_has_compiled(tmp_path):
    """As in a pod: the image's folder is read-only, the one that NUMBA_CACHE_DIR names is new."""
    image, new = tmp_path / "image", tmp_path / "new"
    image.mkdir(mode=0o700)
    program = (
        "import numpy as np; from mfdist.data import shuffle; order = np.empty(10, np.uint32);"
        "shuffle.permute_into(order, np.uint64(1), 0); print(len(shuffle.permute_into.stats.cache_misses), order.sum())"
    )

    def run(**places):
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"} | {
            "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(image), **places
        }  # fmt: skip
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    assert run().stdout == "1 45\n"
    subprocess.run(["mount", "--bind", str(image), str(image)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(image)], check=True)
        assert run(NUMBA_CACHE_DIR=str(new)).stdout == "0 45\n"
        (folder,) = (new / "mfdist").glob("data-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and not list((new / "mfdist").glob("tmp*"))
    finally:
        subprocess.run(["umount", "-l", str(image)], check=True)
