from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest

from pruning.kernels import native

from .layers import available_sets, compiled


@compiled
def test_a_missing_library_is_said_once_and_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "LIBRARY_NAME", "missing.so")
    missing = Path(native.__file__).with_name("missing.so")
    native.library.cache_clear()
    message = (
        f"the sparse kernels are not compiled ({missing}: cannot open shared object file: No such file or directory); "
        f"sparse layers run as dense PyTorch operators, at dense speed. To build them: "
        f"python setup.py build_ext --inplace (needs g++ or clang++)"
    )
    try:
        with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
            assert native.library() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.library() is None
    finally:
        native.library.cache_clear()


@compiled
def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(native.__file__).with_name(native.LIBRARY_NAME)
    changed = tmp_path / "csrc"
    shutil.copytree(native.SOURCES, changed)
    (changed / "layer.h").write_text("// another layout\n")
    monkeypatch.setattr(native, "SOURCES", changed)
    message = f"{path} was built from other sources than those in {changed}"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        native.Library(path)


@compiled
def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.INSTRUCTION_SET_VARIABLE, "portable")
    library = native.Library(Path(native.__file__).with_name(native.LIBRARY_NAME))
    try:
        assert library.instruction_set == "portable"
    finally:
        library.choose("")
    assert library.instruction_set == available_sets()[0]


@compiled
def test_an_instruction_set_that_is_not_there_is_named() -> None:
    library = native.library()
    assert library is not None
    before = library.instruction_set
    message = (
        f"the instruction set 'avx9' is not available here; "
        f"set SECATEUR_INSTRUCTION_SET to one of: {', '.join(available_sets())}"
    )

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        library.choose("avx9")

    assert library.instruction_set == before


@compiled
def test_torch_lends_its_threads() -> None:
    assert native._torch_parallel_for()
