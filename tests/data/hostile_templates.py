"""Chat templates that try to escape, to loop for ever or to take gigabytes; as a script, the memory that they get.

The script imports nothing large: what a process has taken before it becomes the renderer counts as the renderer's. It
is given the path of template_child.py and the folder that jinja2 lies in, and prints the peak memory of any renderer in
bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

GROW = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = CODE %}{% endfor %}{{ ns.x }}"

HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "a string times a number": "{{ 'x' * 10 ** 10 }}",
    "a list times a number": "{{ ([0] * 10 ** 10) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a long integer": "{% set n = 7 ** 300000 %}{{ (n * n * n) % 10 }}{{ 3 ** (10 ** 8) % 7 }}",
    "doubling by +": GROW.replace("CODE", "ns.x + ns.x"),
    "doubling by ~": GROW.replace("CODE", "ns.x ~ ns.x"),
    "doubling by replace": GROW.replace("CODE", "ns.x | replace('x', 'xx')"),
    "doubling by join": GROW.replace("CODE", "[ns.x, ns.x] | join(ns.x)"),
    "a list of lists": GROW.replace("CODE", "[ns.x, ns.x]"),
    "a list of lists as JSON": GROW.replace("CODE", "[ns.x, ns.x]").replace("ns.x }}", "ns.x | tojson }}"),
    "%-format": "{{ '%09999999999d' % 1 }}",
    "format filter": "{{ '%9999999999s' | format(1) }}",
    "str.format": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "indent": "{{ ('x\n' * 99999) | indent(999999, true) }}",
    "tojson's indent": "{{ messages | tojson(indent=9999999999) }}",
    "lorem ipsum": "{{ lipsum(999999999) }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list | length }}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro that branches": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in [[]] recursive %}{{ loop([a]) }}{% endfor %}",
    "deep nesting": "(" * 3000 + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "infinite source": "{% for a in range(99999) %}{{ messages | tojson * 9999 }}{% endfor %}",
    "slow regex": "{{ ('<' * 9999999) | striptags }}{{ ('a@' * 9999999) | urlize }}",
    "escape by class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by globals": "{{ raise_exception.__globals__.json }}",
    "escape by attr": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "escape by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "escape by cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "escape by namespace": "{% set ns = namespace(a=1) %}{{ ns.__init__.__globals__ }}",
    "escape by generation": "{% generation %}{{ caller.__globals__ }}{% endgeneration %}",
    "changing messages": "{{ messages.append(1) }}",
    "including a file": "{% include '/etc/passwd' %}",
    "importing": "{% import 'os' as os %}{{ os.getcwd() }}",
    "no jinja": "{% for %}",
}


def main(child: str, packages: str) -> None:
    """Renders each template in a process of its own."""
    conversation = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "prompt": False, "cuts": [],
                    "seen": []}
    for source in HOSTILE.values():
        lines = [json.dumps({"source": source, "variables": {}, "n": 1}), json.dumps(conversation), ""]
        subprocess.run([sys.executable, "-I", child, packages], input="\n".join(lines).encode(), check=False,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
