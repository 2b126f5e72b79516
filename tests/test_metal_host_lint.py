"""The token lint: each rule fires on what it is for, and not on sound code."""

from dataclasses import dataclass

import pytest

from metal_host.lint import lint_launch, lint_source
from metal_host.lint_rules import RULES


@dataclass
class Case:
    """Two headers or bodies: the first breaks the rule once, the second does not."""

    rule: str
    broken: str
    sound: str
    part: str = "body"


CASES = [
    Case("not-in-msl", "double x = 1.0;", "float x = 1.0f;"),
    Case("not-in-msl", "long double x = 1.0;", "// a double word\nfloat x = 1.0f;"),
    Case("not-in-msl", "goto done; done: y[0] = 1;", "int gotos = 1;"),
    Case("not-in-msl", "try { f(); } ", "int tries = 0;"),
    Case("not-in-msl", "throw 1;", "int throws = 1;"),
    Case("not-in-msl", "auto p = new float[4];", "float p[4];"),
    Case("not-in-msl", "delete p;", "int deleted = 1;"),
    Case("not-in-msl", "bool b = typeid(x) == t;", "bool b = typeids == t;"),
    Case("not-in-msl", 'printf("%d", 1);', 'constant char* s = "printf";'),
    Case(
        "not-in-msl",
        "struct S { virtual void f() thread {} };",
        "struct S { S(thread const S&) = delete; };",
        part="header",
    ),
    Case("std", "y[0] = std::max(a, b);", "y[0] = metal::max(a, b);"),
    Case(
        "variadic",
        "int f(int n, ...) { return n; }",
        "template <typename... Ts> int f(Ts... values) { return (0 + ... + values); }",
        part="header",
    ),
    Case("lambda", "auto f = [&](int i) { return i; };", "y[i] = x[idx[i]] + t[(i)];"),
    Case("lambda", "apply([](float v) { return v; });", "return;"),
    Case(
        "recursion",
        "int f(int n) { return n ? f(n - 1) : 0; }",
        "template <int N> int f() { return f<N - 1>(); }\n"
        "float g(float x) { return x; }\nfloat g(float2 x) { return g(x.x); }\n"
        "struct A { int next() thread { return inner.next(); } B inner; };",
        part="header",
    ),
    Case(
        "recursion",
        "int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return f(n); }",
        "int f(int n) { return n; }\nint g(int n) { return f(n); }",
        part="header",
    ),
    Case(
        "program-scope",
        "constexpr int N = 4;",
        "constant constexpr int N = 4;\nconstant float table[2] = {1.0f, 2.0f};\n"
        "using T = float;\nint f(int n = 4);\nstruct P { float x; };",
        part="header",
    ),
    Case(
        "program-scope", "float seen[4];", "int f() { int x = 4; return x; }", "header"
    ),
    Case(
        "program-scope",
        "struct A { static constexpr int n = 4; };",
        "struct A { static constexpr constant int n = 4; int m = 2; };",
        part="header",
    ),
    Case(
        "static-local", "static int seen = 0;", "static constant int n = 0; int m = 0;"
    ),
    Case(
        "threadgroup-variable",
        "void f() { threadgroup float t[4]; }",
        "void f(threadgroup float* t) { threadgroup float* u = t; }",
        part="header",
    ),
    Case("reserved-name", "int __x = 1;", "int x__ = __METAL_VERSION__;"),
    Case("reserved-name", "int _Total = 1;", "int _total = 1;"),
    Case("reserved-name", "float kernel = 1;", "const device float* k = x;"),
    Case(
        "reserved-name",
        "uint thread = 1;",
        "thread float& t = a; const thread int c = 1;",
    ),
    Case("reserved-name", "#define half float", "#define HALF 2", part="header"),
    Case(
        "float-typedef",
        "typedef bfloat bfloat16;",
        "typedef float4 wide;\nusing T4 = vec<float, 4>;",
        part="header",
    ),
    Case("float-typedef", "using bfloat16_t = bfloat;", "using T = bfloat;", "header"),
    Case(
        "include",
        "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>",
        '#include <metal_simdgroup>\n#include "mlx/backend/metal/kernels/utils.h"',
        part="header",
    ),
    Case("include", "#include <metal_tensor>", "#include <metal_atomic>", "header"),
    Case("include", "#include <cmath>", "#include <metal_math>", "header"),
    Case(
        "member-thread",
        "struct A { float get() const { return v; } float v; };",
        "struct A { A(float x) thread : v(x) {}\n"
        "float get() const thread { return v; }\n"
        "static float one() { return 1; } float v; };\nfloat f() { return 1; }",
        part="header",
    ),
    Case(
        "member-thread",
        "struct A { float operator()(float x) { return x; } };",
        "struct A { float operator()(float x) const device { return x; } };",
    ),
    Case(
        "pointer-space",
        "void f(float* p) { *p = 1; }",
        "void f(thread float* p, device T& q, int n) { *p = n * n; }\n"
        "template <typename T> T g(T a, vec<T, 4> b) { return a & b; }",
        part="header",
    ),
    Case("pointer-space", "float* p = acc;", "auto p = x + 1; thread float* q = acc;"),
    Case(
        "pointer-space", "const float& r = acc[0];", "y[i] = a * b; auto& r = acc[0];"
    ),
    Case(
        "barrier-after-return",
        "if (i >= n) return;\nthreadgroup_barrier(mem_flags::mem_threadgroup);",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\nif (i >= n) return;",
    ),
]


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.rule}-{i}" for i, c in enumerate(CASES)]
)
def test_a_rule_fires_on_what_it_is_for_and_not_on_sound_code(case):
    for text, expected in ((case.broken, {case.rule}), (case.sound, set())):
        header, body = ("", text) if case.part == "body" else (text, "")
        found = lint_source(header, body)
        assert {f.message.partition(":")[0] for f in found} == expected, found
        assert all(
            f.kind == "lint" and f.place and f.place.part == case.part for f in found
        )


def test_every_rule_has_a_case():
    assert {case.rule for case in CASES} == set(RULES)


def test_a_finding_names_the_line_and_shows_it():
    (found,) = lint_source("", "\n    float x = 1;\n    double y = x;  // slow\n")
    assert str(found) == (
        "lint: not-in-msl: MSL has no double "
        "(line 3 of the body: double y = x;  // slow)"
    )


def test_a_line_can_be_excused():
    body = "if (all) return;  // lint: allow barrier-after-return\n"
    body += "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    assert lint_source("", body) == []
    assert lint_source("", body.replace("allow barrier", "allow carrier"))


def test_a_barrier_inside_a_function_of_the_header_counts():
    header = "void sync() { threadgroup_barrier(mem_flags::mem_threadgroup); }"
    (found,) = lint_source(header, "if (i > 3) return;\nsync();")
    assert "barrier in line 2" in found.message


def test_directives_and_continued_lines_keep_the_line_numbers():
    header = "#define F(a) \\\n  ((a) + 1)\n\nint f() { double x; return 1; }"
    (found,) = lint_source(header, "")
    assert found.place and found.place.line == 4


@pytest.mark.parametrize(
    "group, source, expected",
    [
        ((2048, 1, 1), "", {"limit"}),
        ((0, 1, 1), "", {"limit"}),
        ((48, 1, 1), "y[0] = simd_sum(x[0]);", {"lint"}),
        ((48, 1, 1), "y[0] = x[0];", {"remark"}),
        ((32, 4, 1), "y[0] = simd_sum(x[0]);", set()),
    ],
)
def test_the_size_of_a_threadgroup(group, source, expected):
    assert {f.kind for f in lint_launch(source, (4096, 64, 1), group)} == expected


def test_a_group_is_cut_to_the_grid():
    assert lint_launch("simd_sum(x)", (32, 1, 1), (256, 1, 1)) == []
