"""Reading archives of exported programs without running what a stranger put into them.

``torch.export.load`` runs code from the file in more ways than one (seen in PyTorch 2.15): it unpickles payloads that
say they are pickled, unpickles without limits where the weights-only way fails, opens compiled libraries, hands
symbolic shapes to ``eval`` and guards to ``exec``, looks up operators anywhere below ``torch``, and writes names into
generated source. So an archive is first copied record by record, and only what can do none of this is copied.
"""

import ast
import io
import json
import re
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from graph_encoder.errors import SecateurError, first_line

_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_PAYLOADS = {
    "data/weights/model_weights_config.json": "weight_",
    "data/constants/model_constants_config.json": "tensor_",
}
_TENSOR = re.compile(r"data/(weights/weight_|constants/tensor_)\d+")
# The writer adds these by itself.
_OWN = frozenset({"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"})

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|secateur|torchvision)\.\w+\.\w+|math\.\w+|torch\.sym_\w+|"
    r"_operator\.(abs|add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|not_|or_|pos|pow|sub|truediv)"
)
_FILE_OPERATORS = ("torch.ops.aten.save.", "torch.ops.aten.from_file.")
# Free text reaches generated source and format strings: no quote, bracket, line break or semicolon.
_PLAIN_TEXT = re.compile(r"[\w.:+\-,> ]*")
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Constant, ast.Load,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UnaryOp, ast.USub, ast.UAdd,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_FUNCTIONS_OF_SIZES = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Abs", "Mod", "PythonMod", "FloorDiv", "CeilDiv",
    "CleanDiv", "ModularIndexing", "Where", "Max", "Min", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt",
    "FloorToInt", "CeilToInt", "RoundToInt", "Eq", "Ne", "Equality", "Unequality", "Relational", "Le", "Lt", "Ge",
    "Gt", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan", "And", "Or", "Not", "true", "false",
}  # fmt: skip
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


class ArchiveError(SecateurError, RuntimeError):
    """An archive that is damaged, or would run code if it were loaded.

    Attributes:
        what: what in it would; empty if it is damaged.
    """

    def __init__(self, message: str, what: str = "") -> None:
        """Keep the reason beside the message."""
        super().__init__(message)
        self.what = what


def vetted_copy(archive: bytes, name: str) -> bytes:
    """Copy the records that make an exported program, after checking that none can run code.

    What describes the source code (stack traces with the paths of the machine that wrote it) is left out.

    Args:
        archive: content of a file that ``torch.export.save`` wrote.
        name: of the file, for messages.

    Returns:
        An archive that ``torch.export.load`` reads.

    Raises:
        ArchiveError: if the archive is damaged, or holds anything else than tensors and a plain graph.
    """
    try:
        reader = PT2ArchiveReader(io.BytesIO(archive))
        records = {record: reader.read_bytes(record) for record in reader.get_file_names() if record not in _OWN}
        missing = [record for record in (_MODEL, _INPUTS, *_PAYLOADS) if record not in records]
    except (RuntimeError, AssertionError, UnicodeDecodeError) as error:
        raise _damaged(name, first_line(error)) from error
    if missing:
        raise _damaged(name, f"it lacks '{missing[0]}'")
    copy = io.BytesIO()
    with PT2ArchiveWriter(copy) as writer:
        for record, content in records.items():
            try:
                vetted = _vetted_record(record, content, name)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise _damaged(name, f"'{record}' is malformed ({type(error).__name__}: {error})") from error
            writer.write_bytes(record, vetted)
    return copy.getvalue()


def _vetted_record(record: str, content: bytes, name: str) -> bytes:
    if record == _MODEL:
        return json.dumps(_vetted_model(json.loads(content), name)).encode()
    if record == _INPUTS:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # whatever fails here, torch.export.load would go on with an unlimited unpickler
            raise _refused(name, "its sample inputs are pickled Python objects") from error
    elif record in _PAYLOADS:
        for tensor, meta in json.loads(content)["config"].items():
            path = str(meta["path_name"])
            if meta["use_pickle"] or not re.fullmatch(_PAYLOADS[record] + r"\d+", path):
                raise _refused(name, f"'{tensor}' is a pickled Python object")
            _check_strings(meta, name)
    elif not _TENSOR.fullmatch(record):
        raise _refused(name, f"it holds '{record}', which is no part of a plain program")
    return content


def _vetted_model(model: dict[str, Any], name: str) -> dict[str, Any]:
    if model.get("guards_code"):
        raise _refused(name, "it has guards, which are Python source")
    for node in _dictionaries(model):
        if "target" in node:
            node["metadata"] = {}
    _check_strings(model, name)
    return model


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [inner for child in children for inner in _dictionaries(child)]
    return [value, *found] if isinstance(value, dict) else found


def _check_strings(value: Any, name: str, key: str = "") -> None:
    """Check every text in a JSON value by what PyTorch does with it."""
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            _check_strings(inner_key, name)
            _check_strings(inner, name, inner_key)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner, name, key)
    elif not isinstance(value, str):
        return
    elif key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(value) or value.startswith(_FILE_OPERATORS):
            raise _refused(name, f"it calls '{value}', which is no operator of a network")
    elif key == "expr_str":
        _check_expression(value, name)
    elif key in ("in_spec", "out_spec") and value:
        _check_tree(json.loads(value), name)
    elif not _PLAIN_TEXT.fullmatch(value):
        raise _refused(name, f"'{key}' holds the text {value[:80]!r}, which could be source code")


def _check_expression(text: str, name: str) -> None:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, RecursionError, ValueError) as error:
        raise _refused(name, f"the shape {text[:80]!r} is no expression") from error
    for node in nodes:
        is_plain = isinstance(node, _EXPRESSION_NODES)
        if isinstance(node, ast.Call):
            is_plain = isinstance(node.func, ast.Name)
        elif isinstance(node, ast.Name):
            is_plain = node.id in _FUNCTIONS_OF_SIZES or re.fullmatch(r"[a-z]+\d+", node.id) is not None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            # SymPy evaluates texts that it meets as arguments.
            is_plain = isinstance(node.value, str) and re.fullmatch(r"[a-z]+\d+|\d+", node.value) is not None
        if not is_plain:
            raise _refused(name, f"the shape {text[:80]!r} is more than arithmetic on sizes")


def _check_tree(tree: Any, name: str) -> None:
    for node in _dictionaries(tree):
        if "__enum__" in node or node.get("type") not in _CONTAINERS:
            raise _refused(name, f"its inputs or outputs are of the type {node.get('type')!r}")
        context = node.get("context")
        _check_strings(json.loads(context) if isinstance(context, str) else context, name)


def _damaged(name: str, what: str) -> ArchiveError:
    msg = f"cannot read the program '{name}': {what}; it is no exported program, or was cut short"
    return ArchiveError(msg)


def _refused(name: str, what: str) -> ArchiveError:
    msg = f"the program '{name}' is refused: {what}; loading it could run any code. Write it with `export_program`"
    return ArchiveError(msg, what)
