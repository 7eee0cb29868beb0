"""
The settings of a script are its module globals; config files and the command line change them:

    python sft.py config/toy_sft.py --learning_rate=1e-4 --max_steps 200

A script assigns its settings at the top, a comment behind each, and ends with

    if __name__ == "__main__":
        configurator.run(main, globals())

Defaults count least, then config files from left to right, then the command line. A value must have the type of its
default (an int will do for a float, a tuple keeps its length); None always fits, and a default of None takes anything.
A config file holds assignments only: values, arithmetic, names of settings, and names of its own that begin with "_".
"""
import ast, difflib, errno, io, math, os, sys, time, tokenize

BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NODES = (ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Dict, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
DISK_FULL = ("No space left on device", "unexpected pos")       # as safetensors and as torch.save put it, without an errno

class UserError(Exception):
    """A user's mistake, told in one line: what, where, what to do. rank_local=True: other ranks may not have noticed."""
    def __init__(self, message, rank_local=False):
        super().__init__(message)
        self.rank_local = rank_local

def run(main, settings):
    """Set the settings, call main(). A user's mistake ends in one line on stderr and exit code 2, a bug in its traceback."""
    try:
        configure(settings)
        main()
    except UserError as e:
        _exit(2, f"error: {e}", e.rank_local)
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except Exception as e:
        if getattr(e, "errno", None) != errno.ENOSPC and not any(text in str(e) for text in DISK_FULL):
            raise
        name = getattr(e, "filename", None) or "a file"
        _exit(2, f"error: disk full while writing {name}: free space and start again with the same command", rank_local=True)

def configure(settings, argv=None):
    """Apply argv (default: the command line) to settings, a script's globals(), and print what differs from the defaults.

    Returns {name: value} of all settings. Raises UserError for an unknown name, a value of another type or a config file
    that cannot be read, and then changes nothing. --help lists the settings and exits with code 0."""
    docs, defaults = _docs(settings), values(settings)
    new, origin = dict(defaults), {}                                    # origin: where a setting was changed last
    files, options, want_help = _split(list(sys.argv[1:] if argv is None else argv), defaults)
    for path in files:
        _read_file(path, new, defaults, origin)
    for name, text in options:
        try:
            new[name], origin[name] = _fit(_parse(text, defaults[name]), defaults[name]), "command line"
        except ValueError as e:
            raise UserError(f"command line: --{name}={text}: {e}") from None
    settings.update(new)
    if int(os.environ.get("RANK", 0)) == 0:
        if want_help:
            _print_help(settings, docs, defaults)
        else:
            changed = [name for name in new if new[name] != defaults[name]]
            print("settings changed from their defaults:" if changed else "all settings have their defaults", flush=True)
            for name in changed:
                print(f"  {name:<24} {_short(defaults[name])} -> {_short(new[name])}  ({origin[name]})", flush=True)
    if want_help:
        sys.exit(0)
    return new

def values(settings):
    """{name: value} of all settings as they are now; what a script writes to its config.json."""
    return {name: settings[name] for name in _docs(settings)}

def _docs(settings):
    """{name: (heading, comment)} of the settings in a script's globals(), taken from its source text."""
    with tokenize.open(settings["__file__"]) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    indented = {line for line, text in enumerate(source.splitlines(), 1) if text[:1].isspace() and text.lstrip()[:1] == "#"}
    docs = {}
    for node in ast.parse(source).body:
        for name in [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]:
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or name.startswith("_") or name != name.lower():
                continue
            if name not in docs and _plain(settings.get(name, ...)):
                headings = [text for line, text in comments.items() if line < node.lineno and text.startswith("# ---")]
                end = node.end_lineno
                while end + 1 in indented:                              # the comment goes on below
                    end += 1
                own = [comments[line].lstrip("# ") for line in range(node.lineno, end + 1) if line in comments]
                docs[name] = (headings[-1].strip("#- ") if headings else "", " ".join(own))
    return docs

def _plain(value):
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    return value is None or isinstance(value, (bool, int, float, str)) if parts is None else all(map(_plain, parts))

def _split(args, defaults):
    """The command line as config files, (name, text) options, and whether help is asked for."""
    files, options, want_help = [], [], False
    while args:
        arg = args.pop(0)
        key, equals, text = arg.partition("=")                          # only the first '=' separates
        name = key[2:].replace("-", "_")
        if arg in ("--help", "-h"):
            want_help = True
        elif not arg.startswith("--"):
            if not arg.endswith(".py"):
                raise UserError(f"command line: {arg!r} is neither --setting=value nor a config file (.py)")
            files.append(arg)
        elif name not in defaults:
            raise UserError(f"command line: unknown setting {key}{_nearest(name, defaults)}")
        elif equals:
            options.append((name, text))
        elif isinstance(defaults[name], bool):                          # --flag, --flag false
            options.append((name, args.pop(0) if args and args[0].lower() in (*BOOLS, "none") else "true"))
        elif args and not args[0].startswith("--"):
            options.append((name, args.pop(0)))
        else:
            raise UserError(f"command line: {key} needs a value, {key}=...")
    return files, options, want_help

def _read_file(path, new, defaults, origin):
    """Apply the assignments of a config file to new, noting their line in origin."""
    try:
        with tokenize.open(path) as f:
            body = ast.parse(f.read()).body
    except OSError as e:
        raise UserError(f"config file {path}: {e.strerror}") from None
    except (SyntaxError, ValueError) as e:
        raise UserError(f"config file {path}:{getattr(e, 'lineno', None) or 1}: {getattr(e, 'msg', e)}") from None
    own = {}                                                            # _names of the file
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue                                                    # a docstring
        where = f"{path}:{node.lineno}"
        if not isinstance(node, ast.Assign) or len(node.targets) > 1 or not isinstance(node.targets[0], ast.Name):
            raise UserError(f"{where}: a config file holds assignments only, name = value")
        name = node.targets[0].id
        if name not in defaults and not name.startswith("_"):
            raise UserError(f"{where}: unknown setting {name}{_nearest(name, defaults)}")
        try:
            value = _evaluate(node.value, {**new, **own})
            if name in defaults:
                new[name], origin[name] = _fit(value, defaults[name]), where
            else:
                own[name] = value
        except ValueError as e:
            raise UserError(f"{where}: {name}: {e}") from None

def _evaluate(node, names):
    """The value of a parsed expression of literals, arithmetic and names. Raises ValueError for anything else."""
    names = {"inf": math.inf, **names}
    for n in ast.walk(node):                                            # no calls, no attributes: eval can do no harm
        if isinstance(n, ast.Name) and n.id not in names:
            raise ValueError(f"unknown name {n.id}{_nearest(n.id, names)}; strings need quotes")
        if not isinstance(n, NODES):
            raise ValueError("only values, arithmetic and names of settings can stand here")
    try:
        return eval(compile(ast.Expression(node), "setting", "eval"), {"__builtins__": {}}, names)
    except (TypeError, ArithmeticError) as e:
        raise ValueError(e) from None

def _parse(text, default):
    """The value that text on the command line means for a setting with this default."""
    if text == "None":
        return None
    if isinstance(default, str):
        return text                                                     # raw: model ids and paths need no quotes
    if isinstance(default, bool) or default is None and text.lower() in ("true", "false"):
        return BOOLS.get(text.lower(), text)
    if isinstance(default, (list, tuple)) and not text.startswith(("[", "(")):   # a,b,c
        return [_parse(part.strip(), default[0] if default else None) for part in text.split(",") if part.strip()]
    try:                                                                # no arithmetic without a type: 2025-11-21 is a name
        return ast.literal_eval(text) if default is None else _evaluate(ast.parse(text.strip(), mode="eval").body, {})
    except (ValueError, SyntaxError):
        return text                                                     # _fit refuses it if it must

def _fit(value, default):
    """value in the type of default. Raises ValueError if it has another type."""
    kind = type(default)
    if value is None or default is None or type(value) is kind and kind in (bool, int, float, str, dict):
        return value
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():     # 2e5
        return int(value)
    if kind is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if kind in (list, tuple) and type(value) in (list, tuple) and (kind is list or len(value) == len(default) or not default):
        same = len({type(item) for item in default}) == 1               # then every item must have that type
        return kind(_fit(item, default[0] if same else None) for item in value)
    name = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}.get(kind, f"values like {_short(default)}")
    raise ValueError(f"expects {name}, got {_short(value)}")

def _nearest(name, names):
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else " (--help lists the settings)"

def _short(value):
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."

def _print_help(settings, docs, defaults):
    print((settings.get("__doc__") or "").strip().split("\n\n")[0])
    print(f"\nusage: python {os.path.basename(settings['__file__'])} [config/file.py ...] [--setting=value ...]")
    last = None
    for name, (heading, comment) in docs.items():
        if heading != last:
            print(f"\n{heading}")
        last, changed = heading, settings[name] != defaults[name]
        default = f" [default: {_short(defaults[name])}]" if changed else ""
        print(f"  {f'--{name}={_short(settings[name])}':<42} {comment}{default}")

def _exit(code, line, rank_local=False):
    """End the process with one line on stderr, from rank 0 or from the rank that alone has the error."""
    rank = int(os.environ.get("RANK", 0))
    if rank and not rank_local and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(5)           # once rank 0 has spoken and left, torchrun ends us; if we wake up, only we have the error
        rank_local = True
    if not rank or rank_local:
        print((f"[rank {rank}] " if rank else "") + " ".join(line.split()), file=sys.stderr, flush=True)
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)          # an orderly exit could wait for ranks that wait for us
    sys.exit(code)
