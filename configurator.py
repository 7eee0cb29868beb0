"""
The settings of a script are its module globals; config files and the command line change them:

    python sft.py config/toy_sft.py --learning_rate=1e-4 --max_steps 200

A script assigns them at the top, lower-case names with a comment behind each, and ends with run(main, globals()). Config
files count in their order, then the command line. A value has the type of its default (an int will do for a float), or of an
annotation (shard: int = None); None always fits. A config file holds assignments; they may use settings:  a = 10 * max_steps
"""
import ast, contextlib, difflib, os, re, sys, time, tokenize, traceback

class UserError(Exception):
    """A user's mistake, told in one line: what, where, what to do. Rank 0 tells it; the others do if it is rank_local."""
    def __init__(self, message, rank_local=False):
        super().__init__(message)
        self.rank_local = rank_local

def run(main, settings):
    """Set the settings, call main(). A user's mistake ends in one line on stderr and exit code 2, a bug in its traceback."""
    try:
        configure(settings)
        main()
        code, line, rank_local = 0, "", False
    except KeyboardInterrupt:
        code, line, rank_local = 130, "interrupted", False
    except (UserError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as e:   # a bad out_dir, say
        code, line, rank_local = 2, f"error: {e}", getattr(e, "rank_local", True)
    except BaseException as e:                                      # torch's CheckpointException is no Exception
        if not re.search("No space left|quota exceeded|Read-only file|unexpected pos", "".join(traceback.format_exception(e))):
            raise                                                   # the trace has the causes, too; the last is torch.save's
        code, line, rank_local = 2, "error: disk full or read-only: free it, start the command again", isinstance(e, OSError)
    rank = int(os.environ.get("RANK", 0))
    if code and (rank == 0 or rank_local):
        print((f"[rank {rank}] " if rank else "") + " ".join(line.split()), file=sys.stderr, flush=True)
    elif code and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(5)                                               # torchrun ends all when one ends: rank 0 is to speak first
    sys.stdout.flush()      # With processes no orderly exit: it could wait for ranks that wait for us, and in one of 12 runs a
    (os._exit if "RANK" in os.environ else sys.exit)(code)          # thread of torch's, late for Python's lock, aborted it

def configure(settings, argv=None):
    """Apply argv (default: the command line) to settings, a script's globals(), and print what differs from the default; --help
    lists all, with exit code 0. Returns {name: value}. UserError: unknown name, other type, no such file; nothing changes."""
    args, rank = list(sys.argv[1:] if argv is None else argv), int(os.environ.get("RANK", 0))
    if "--help" in args or "-h" in args:
        sys.exit(_print_help(settings) if rank == 0 else None)
    in_files, in_args = [], []                                      # (where, name, expression or text)
    while args:
        key, equals, text = args.pop(0).partition("=")              # only the first '=' separates
        if not key.startswith("--"):
            in_files += _read_file(key + equals + text)
        elif equals or args and not args[0].startswith("--"):
            in_args.append(("command line", key[2:], text if equals else args.pop(0)))
        else:
            raise UserError(f"command line: {key} needs a value, {key}=... (--help lists the settings)")
    defaults, new, origin = values(settings), values(settings), {}
    kinds = settings.get("__annotations__") or settings.get("__annotate__", lambda form: {})(1)     # Python 3.14: on demand
    for where, name, given in in_files + in_args:
        if name not in defaults:
            hint = "".join(f"did you mean {near}?" for near in difflib.get_close_matches(name, defaults, n=1))
            raise UserError(f"{where}: unknown setting {name} ({hint or '--help lists the settings'})")
        like = kinds[name]() if defaults[name] is None and name in kinds else defaults[name]        # 0 or "", for None
        try:
            new[name], origin[name] = _check_type(_evaluate(given, like, new), like), where
        except Exception as e:
            raise UserError(f"{where}: {name}: {e}") from None
    settings.update(new)
    if rank == 0:
        print("settings that differ from their defaults:" if new != defaults else "all settings have their defaults")
        for name in [name for name in new if new[name] != defaults[name]]:
            print(f"  {name:<24} {defaults[name]!r:.60} -> {new[name]!r:.60}  ({origin[name]})")
    return new

def values(settings):
    """{name: value} of all settings as they are now; what a script writes to its config.json."""
    kinds = (type(None), bool, int, float, str, list, tuple, dict)
    return {name: v for name, v in settings.items() if name == name.lower() and name[0] != "_" and isinstance(v, kinds)}

def _read_file(path):
    try:
        with open(path, encoding="utf-8") as f:
            body = ast.parse(f.read()).body
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"config file {path}:{getattr(e, 'lineno', None) or ''} {getattr(e, 'msg', e)}") from None
    for node in body:
        if not isinstance(node, ast.Assign) or [type(target) for target in node.targets] != [ast.Name]:
            raise UserError(f"{path}:{node.lineno}: a config file holds assignments only, name = value")
        yield f"{path}:{node.lineno}", node.targets[0].id, ast.Expression(node.value)

def _evaluate(given, default, settings):
    """The value of an expression in a config file, or of text on the command line for a setting with this default."""
    if isinstance(given, ast.Expression):                           # no builtins: a name is a setting or a mistake
        return eval(compile(given, "config", "eval"), {"__builtins__": {}, **settings})
    if isinstance(default, str) and given != "None":
        return given                                                # raw: model ids and paths need no quotes
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(given.title() if given in ("true", "false") else given)
    return given                                                    # a string; _check_type refuses it if it must

def _check_type(value, default):
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is list and type(value) is list and default:   # every item must be like the first
        return [_check_type(item, default[0]) for item in value]
    if value is None or default is None or type(value) is type(default):
        return value
    raise ValueError(f"expects {type(default).__name__} (like {default!r:.60}), got {value!r:.60}")

def _print_help(settings):
    print(settings["__doc__"].strip(), "\n\nusage: [config/file.py ...] [--setting=value ...]", sep="", end="")
    defaults, name = values(settings), ""
    with tokenize.open(settings["__file__"]) as f:
        for kind, text, (_, column), *_ in tokenize.generate_tokens(f.readline):
            if column == 0 and text.startswith("# --- "):
                print(f"\n\n{text[6:]}", end="")
            elif column == 0 and kind == tokenize.NAME:
                name = text                                         # of a setting, or def, or import, ...
                print(f"\n  {f'--{name}={defaults[name]!r:.60}':<42} " if name in defaults else "", end="")
            elif kind == tokenize.COMMENT and column > 0 and name in defaults:
                print(text[1:], end="")                             # behind the value, or indented below it
    print()
