"""Generated training text of the domain `math`: worked arithmetic, algebra and calculus.

In: a seed. Out: the text of one document, which depends only on the seed, because it uses nothing but
`random.Random` and exact numbers. Documents of different seeds share templates, not numbers.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random


def math_document(seed: int) -> str:
    """Return about two thousand characters of worked arithmetic, algebra and calculus."""
    rng = Random(f"math-{seed}")
    return "\n".join(rng.choice(PROBLEMS)(rng) + "\n" for _ in range(20))


def _polynomial(coefficients: list[int], x: str = "x") -> str:
    """Return a polynomial as text, highest power first: [1, -2, 0] is `x^2 - 2x`."""
    text = ""
    for power, c in zip(range(len(coefficients) - 1, -1, -1), coefficients, strict=True):
        if c == 0:
            continue
        body = {0: "", 1: x}.get(power, f"{x}^{power}")
        size = "" if abs(c) == 1 and power else str(abs(c))
        text += (" - " if c < 0 else " + ") + size + body
    if not text:
        return "0"
    return text[3:] if text.startswith(" + ") else "-" + text[3:]


def _nonzero(rng: Random, bound: int) -> int:
    """Return a nonzero number from -bound to bound."""
    return rng.choice([-1, 1]) * rng.randint(1, bound)


def _arithmetic(rng: Random) -> str:
    a, b, c = rng.randint(2, 999), rng.randint(2, 999), rng.randint(2, 99)
    return rng.choice(
        [
            f"{a} + {b} = {a + b}\n{a + b} - {c} = {a + b - c}",
            f"{a + b} - {b} = {a}",
            f"{a} * {c} = {a * c}\n{a * c} / {a} = {c}",
            f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}",
            f"{a * c} / {c} + {b} = {a} + {b} = {a + b}",
            f"{c}^2 = {c * c}\nsqrt({c * c}) = {c}",
        ]
    )


def _long_multiplication(rng: Random) -> str:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    head = rng.choice([f"Compute {a} * {b}.", f"{a} * {b} = ?", f"Multiply {a} by {b}."])
    return (
        f"{head}\n{a} * {tens} = {a * tens}\n{a} * {ones} = {a * ones}\n"
        f"{a * tens} + {a * ones} = {a * b}\n{a} * {b} = {a * b}"
    )


def _linear_equation(rng: Random) -> str:
    a, x, b = rng.randint(2, 15), _nonzero(rng, 20), _nonzero(rng, 40)
    v = rng.choice("xyznt")
    head = rng.choice(["Solve for {v}: {e}", "Solve {e}.", "{e}", "Find {v} if {e}."])
    head = head.format(v=v, e=f"{_polynomial([a, b], v)} = {a * x + b}")
    return f"{head}\n{a}{v} = {a * x + b} {'-' if b > 0 else '+'} {abs(b)}\n{a}{v} = {a * x}\n{v} = {x}"


def _quadratic(rng: Random) -> str:
    p, q = _nonzero(rng, 12), _nonzero(rng, 12)
    head = rng.choice(["Solve {e} = 0.", "Factor {e}.", "Find the roots of {e}.", "{e} = 0"])
    factors = "".join(f"({_polynomial([1, -root])})" for root in (p, q))
    roots = f"x = {p}" if p == q else f"x = {p} or x = {q}"
    return f"{head.format(e=_polynomial([1, -p - q, p * q]))}\n{factors} = 0\n{roots}"


def _discriminant(rng: Random) -> str:
    a, b, c = rng.randint(1, 6), _nonzero(rng, 12), _nonzero(rng, 9)
    d = b * b - 4 * a * c
    count = "two real roots" if d > 0 else "one real root" if d == 0 else "no real roots"
    product = f"4 * {a} * {c}" if c > 0 else f"4 * {a} * ({c})"
    square = f"{b}^2" if b > 0 else f"({b})^2"
    sign = ">" if d > 0 else "=" if d == 0 else "<"
    return f"{_polynomial([a, b, c])} = 0\nD = b^2 - 4ac = {square} - {product} = {d}\nD {sign} 0: {count}"


def _derivative(rng: Random) -> str:
    c = [_nonzero(rng, 9) for _ in range(rng.randint(2, 5))]
    powers = range(len(c) - 1, 0, -1)
    slope = [p * k for p, k in zip(powers, c, strict=False)]
    if rng.random() < 0.5:
        return f"f(x) = {_polynomial(c)}\nf'(x) = {_polynomial(slope)}"
    return f"d/dx ({_polynomial(c)}) = {_polynomial(slope)}"


def _integral(rng: Random) -> str:
    c = [_nonzero(rng, 6) for _ in range(rng.randint(1, 3))]
    inner = [k * p for k, p in zip(c, range(len(c), 0, -1), strict=True)]
    a, b = 0, rng.randint(1, 5)
    whole = _polynomial([*c, 0])
    value = sum(k * b**p for k, p in zip(c, range(len(c), 0, -1), strict=True))
    return f"int ({_polynomial(inner)}) dx = {whole} + C\nint_{a}^{b} ({_polynomial(inner)}) dx = {value}"


def _evaluation(rng: Random) -> str:
    a, b, c, x = _nonzero(rng, 6), _nonzero(rng, 9), _nonzero(rng, 12), rng.randint(2, 9)
    f = rng.choice("fghp")
    steps = f"{a * x * x} {'-' if b < 0 else '+'} {abs(b * x)} {'-' if c < 0 else '+'} {abs(c)}"
    return f"{f}(x) = {_polynomial([a, b, c])}\n{f}({x}) = {steps} = {a * x * x + b * x + c}"


def _fractions(rng: Random) -> str:
    a, b = Fraction(rng.randint(1, 9), rng.randint(2, 12)), Fraction(rng.randint(1, 9), rng.randint(2, 12))
    common = math.lcm(a.denominator, b.denominator)
    sign, total = rng.choice([("+", a + b), ("-", a - b)])
    left, right = a.numerator * common // a.denominator, b.numerator * common // b.denominator
    if rng.random() < 0.3:
        return f"{a} * {b} = {a.numerator * b.numerator}/{a.denominator * b.denominator} = {a * b}"
    return f"{a} {sign} {b} = {left}/{common} {sign} {right}/{common} = {total}"


def _euclid(rng: Random) -> str:
    a, b = rng.randint(40, 999), rng.randint(12, 300)
    lines = [f"gcd({a}, {b})"]
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return "\n".join([*lines, f"gcd = {a}"])


def _system(rng: Random) -> str:
    x, y, a, b = _nonzero(rng, 9), _nonzero(rng, 9), rng.randint(2, 6), rng.randint(2, 6)
    total, weighted = x + y, a * x + (a + b) * y
    return (
        f"x + y = {total}\n{a}x + {a + b}y = {weighted}\nx = {total} - y\n"
        f"{a}({total} - y) + {a + b}y = {weighted}\n"
        f"{b}y = {weighted - a * total}\ny = {y}\nx = {x}"
    )


def _percentage(rng: Random) -> str:
    percent, base = 5 * rng.randint(1, 19), 20 * rng.randint(1, 60)
    return f"{percent}% of {base} = {percent} * {base} / 100 = {percent * base}/100 = {percent * base // 100}"


def _series(rng: Random) -> str:
    first, step, count = rng.randint(1, 12), rng.randint(1, 9), rng.randint(4, 30)
    last = first + (count - 1) * step
    shown = ", ".join(str(first + i * step) for i in range(4))
    return (
        f"a_n: {shown}, ...\na_{count} = {first} + {count - 1} * {step} = {last}\n"
        f"S_{count} = {count} * ({first} + {last}) / 2 = {count * (first + last) // 2}"
    )


def _powers(rng: Random) -> str:
    base, m, n = rng.randint(2, 9), rng.randint(1, 6), rng.randint(1, 6)
    if rng.random() < 0.4:
        return f"log_{base}({base**m}) = {m}\n{base}^{m} = {base**m}"
    return f"{base}^{m} * {base}^{n} = {base}^({m} + {n}) = {base}^{m + n} = {base ** (m + n)}"


def _modulus(rng: Random) -> str:
    n, a, b = rng.randint(3, 29), rng.randint(10, 200), rng.randint(10, 200)
    product = f"{a % n} * {b % n} mod {n} = {a * b % n}"
    return f"{a} mod {n} = {a % n}\n{b} mod {n} = {b % n}\n{a} * {b} mod {n} = {product}"


def _triangle(rng: Random) -> str:
    m, n = sorted(rng.sample(range(1, 9), 2))
    a, b, c = n * n - m * m, 2 * m * n, n * n + m * m
    return (
        f"a = {a}, b = {b}\nc^2 = {a}^2 + {b}^2 = {a * a} + {b * b} = {c * c}\n"
        f"c = sqrt({c * c}) = {c}\nA = {a} * {b} / 2 = {a * b // 2}"
    )


def _determinant(rng: Random) -> str:
    a, b, c, d = (rng.randint(-9, 9) for _ in range(4))
    value = f"{a * d} - ({b * c}) = {a * d - b * c}"
    return f"A = [[{a}, {b}], [{c}, {d}]]\ndet A = ({a})({d}) - ({b})({c}) = {value}"


PROBLEMS: tuple[Callable[[Random], str], ...] = (
    _arithmetic,
    _long_multiplication,
    _linear_equation,
    _quadratic,
    _discriminant,
    _derivative,
    _integral,
    _evaluation,
    _fractions,
    _euclid,
    _system,
    _percentage,
    _series,
    _powers,
    _modulus,
    _triangle,
    _determinant,
)
