"""Settings: the defaults at the top of a script, then config files, then --key=value; the later wins.

A script lists its settings as plain globals between a line "# settings ---" and a line of dashes, each with a comment:

    # settings ---------------------------------------------------
    batch_size = 8  # clips per step [>= 1]
    noise_schedule: str = None  # None is not set, and needs the annotation
    # ------------------------------------------------------------
    config = configure(globals())

`configure` puts the final values into those globals and returns them as a dict. --help prints the comments; a bound at
the end of one, as [>= 1], [> 0] or [0 to 1], is what the value is checked against.
"""
import ast
import difflib
import glob
import operator
import os
import re
import runpy
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

BLOCK = re.compile(r'# settings -+\n(.*?)\n *# -{20,}', re.DOTALL)
SETTING = re.compile(r' *(\w+)(?:: (\w+))? = (.+?)(?:  # (.*))?')
BOUND = re.compile(r'\[(>=|>|<=|<) (\S+)\]$|\[(\S+) to (\S+)\]$')
COMPARE = {'>=': operator.ge, '>': operator.gt, '<=': operator.le, '<': operator.lt}


class UserError(ValueError):
    """A mistake of the user's, in one line: what was given, what was expected, how to mend it.

    Scripts print the line and exit with 1; a notebook can catch it.
    """


def print_one_line(kind, error, trace):
    """For sys.excepthook: no traceback for a mistake of the user's, or for Ctrl-C."""
    if issubclass(kind, UserError):
        print(error, file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@dataclass
class Setting:
    """One line of a script's settings."""
    default: Any
    type: str  # int, float, str, bool or tuple
    text: str  # the default as it is written
    comment: str
    heading: str  # the comment line it stands under

    def accepts(self, value):
        if value is None:
            return self.default is None
        return type(value).__name__ == self.type

    def within_bounds(self, value):
        bound = BOUND.search(self.comment)
        if not bound or value is None:
            return True
        sign, limit, low, high = bound.groups()
        if sign:
            return COMPARE[sign](value, float(limit))
        return float(low) <= value <= float(high)


def read_settings(namespace):
    """{key: Setting} of the script or module with these globals."""
    with open(namespace['__file__']) as f:
        block = BLOCK.search(f.read())
    settings, heading = {}, ''
    for line in block[1].splitlines():
        match = SETTING.fullmatch(line)
        if match:
            key, annotation, text, comment = match.groups()
            default = namespace[key]
            kind = annotation or type(default).__name__
            settings[key] = Setting(default, kind, text, comment or '', heading)
        elif line.strip().startswith('#'):
            heading = line.strip()
    return settings


def print_help(namespace, settings):
    print(namespace['__doc__'].strip())
    print('\nSettings (--key=value):')
    heading = ''
    for key, setting in settings.items():
        if setting.heading != heading:
            heading = setting.heading
            print(f'\n  {heading}')
        option = f'--{key}={setting.text}'
        print(f'    {option:<36} {setting.comment}')


def parse(text, setting):
    """The value that --key=text means; text itself where it is no Python literal."""
    if setting.type == 'str':
        return None if setting.default is None and text.lower() == 'none' else text
    if text.lower() in ('true', 'false', 'none'):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def checked(key, value, settings, source):
    """The value as it will be used. Raises UserError for an unknown key, a wrong type or a value out of bounds."""
    if key not in settings:
        nearest = difflib.get_close_matches(key, settings, n=1, cutoff=0)[0]
        raise UserError(f'{source}: unknown key {key!r}; did you mean {nearest!r}? (--help lists them all)')
    setting = settings[key]
    if setting.type == 'float' and type(value) is int:
        value = float(value)
    if not setting.accepts(value):
        raise UserError(f'{source}: {key}={value!r} is of the wrong type; '
                        f'expected {setting.type}, like {setting.default!r}')
    if not setting.within_bounds(value):
        raise UserError(f'{source}: {key}={value!r}: expected {BOUND.search(setting.comment)[0][1:-1]}')
    return value


def run_config_file(path):
    """{key: value} that a config file assigns; a config file may start from another one by importing it."""
    if not os.path.exists(path):
        there = ', '.join(sorted(glob.glob('config/**/*.py', recursive=True)))
        raise UserError(f'{path}: no such config file; there are {there}')
    try:
        values = runpy.run_path(path)
    except Exception as e:
        raise UserError(f'{path}: {type(e).__name__}: {e}') from e
    return {k: v for k, v in values.items() if not k.startswith('_') and not isinstance(v, ModuleType)}


def configure(namespace, shared=None, argv=None, strict=True):
    """Apply the command line to the settings of the script whose globals() this is; returns {key: value}.

    shared: a module with settings of its own, which the script has too: they are in the returned dict only.
    argv: instead of sys.argv[1:]. strict=False passes over what config files say to other scripts.
    """
    sys.excepthook = print_one_line
    argv = sys.argv[1:] if argv is None else argv
    settings = read_settings(namespace)
    own = list(settings)
    if shared:
        settings |= read_settings(vars(shared))
    if '--help' in argv or '-h' in argv:
        print_help(namespace, settings)
        sys.exit()

    values = {key: setting.default for key, setting in settings.items()}
    for arg in argv:
        option = re.fullmatch(r'--(\w+)=(.*)', arg, re.DOTALL)
        if option:
            key, text = option.groups()
            value = parse(text, settings[key]) if key in settings else text
            values[key] = checked(key, value, settings, 'command line')
        elif arg.endswith('.py'):
            for key, value in run_config_file(arg).items():
                if strict or key in settings:
                    values[key] = checked(key, value, settings, arg)
        else:
            raise UserError(f'{arg!r}: expected a config file (*.py) or --key=value; --help lists the keys')
    namespace.update({key: values[key] for key in own})
    return values
