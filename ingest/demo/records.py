"""Generated training text of the domain `json`: records as a web service would exchange them.

In: a seed. Out: the text of one document, which depends only on the seed. Documents of different seeds
share the shapes of records, not their values.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ada Amir Bea Carlos Chen Dana Elif Emeka Freya Hana Ivan Jonas Kofi Lena Mateo Mina Noor Olga "
    "Priya Ravi Sofia Tomas Yuki Zoe"
)
SURNAMES = _words(
    "Abe Berg Costa Diaz Evans Fischer Garcia Haddad Ito Jensen Kim Lopez Meyer Novak Okafor Patel "
    "Quinn Rossi Silva Tanaka Weber Young"
)
CITIES = _words(
    "Accra Berlin Bogota Cairo Delhi Dublin Geneva Hanoi Jakarta Kyiv Lagos Lima Lisbon Madrid "
    "Nairobi Oslo Prague Quito Seoul Toronto Vienna"
)
ITEMS = _words(
    "backpack bottle camera chair desk headphones jacket keyboard lamp monitor mouse notebook phone "
    "printer router speaker tablet webcam"
)
COLOURS = _words("black blue brown green grey orange purple red silver white yellow")
SERVICES = _words(
    "auth billing cache catalog gateway inventory mailer metrics orders payments queue search sessions storage"
)
STATUSES = _words("active archived cancelled closed failed open paid pending queued running shipped")
TAGS = _words("alpha beta cloud eu fast gift internal legacy new premium sale small staging test us vip")


def json_document(seed: int) -> str:
    """Return about two thousand characters of JSON records, all of one kind and printed in one style."""
    rng = Random(f"json-{seed}")
    record = rng.choice(RECORDS)
    indent = rng.choice([None, None, 2, 2, 4])
    separators = (",", ":") if indent is None and rng.random() < 0.4 else None
    count = rng.randint(4, 8) if indent else rng.randint(8, 16)
    records = [json.dumps(record(rng), indent=indent, separators=separators) for _ in range(count)]
    return "\n".join(records) + "\n"


def _date(rng: Random) -> str:
    return f"{rng.randint(2015, 2025)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _time(rng: Random) -> str:
    return f"{_date(rng)}T{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}Z"


def _identifier(rng: Random) -> str:
    return f"{rng.getrandbits(32):08x}"


def _decimal(rng: Random, bound: int) -> float:
    return rng.randint(0, 100 * bound) / 100


def _user(rng: Random) -> dict[str, Any]:
    first, last = rng.choice(NAMES), rng.choice(SURNAMES)
    return {
        "id": rng.randint(1, 99999),
        "name": f"{first} {last}",
        "email": f"{first}.{last}@example.com".lower(),
        "age": rng.randint(18, 80),
        "active": rng.random() < 0.7,
        "address": {"city": rng.choice(CITIES), "zip": f"{rng.randint(10000, 99999)}"},
        "tags": rng.sample(TAGS, rng.randint(0, 3)),
    }


def _order(rng: Random) -> dict[str, Any]:
    lines: list[dict[str, Any]] = [
        {
            "sku": f"{rng.choice(ITEMS)[:3].upper()}-{rng.randint(100, 999)}",
            "quantity": rng.randint(1, 9),
            "price": _decimal(rng, 200),
        }
        for _ in range(rng.randint(1, 3))
    ]
    return {
        "order_id": _identifier(rng),
        "customer": {"id": rng.randint(1, 99999), "name": rng.choice(NAMES)},
        "items": lines,
        "total": round(sum(line["quantity"] * line["price"] for line in lines), 2),
        "currency": rng.choice(["EUR", "USD", "GBP", "JPY"]),
        "status": rng.choice(STATUSES),
        "created_at": _time(rng),
    }


def _event(rng: Random) -> dict[str, Any]:
    return {
        "timestamp": _time(rng),
        "level": rng.choice(["debug", "info", "info", "warning", "error"]),
        "service": rng.choice(SERVICES),
        "request_id": _identifier(rng),
        "path": f"/api/v{rng.randint(1, 3)}/{rng.choice(SERVICES)}/{rng.randint(1, 999)}",
        "status": rng.choice([200, 200, 201, 204, 301, 400, 403, 404, 500, 503]),
        "duration_ms": rng.randint(1, 3000),
    }


def _product(rng: Random) -> dict[str, Any]:
    return {
        "sku": f"{rng.choice(ITEMS)[:3].upper()}-{rng.randint(100, 999)}",
        "title": f"{rng.choice(COLOURS)} {rng.choice(ITEMS)}",
        "price": {"amount": _decimal(rng, 500), "currency": rng.choice(["EUR", "USD", "GBP"])},
        "stock": rng.randint(0, 500),
        "rating": rng.randint(10, 50) / 10,
        "colors": rng.sample(COLOURS, rng.randint(1, 4)),
        "discount": rng.choice([None, None, 0.1, 0.2, 0.5]),
    }


def _place(rng: Random) -> dict[str, Any]:
    point = [rng.randint(-1800000, 1800000) / 10000, rng.randint(-900000, 900000) / 10000]
    return {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": point},
        "properties": {
            "name": rng.choice(CITIES),
            "population": rng.randint(1000, 9000000),
            "capital": rng.random() < 0.3,
        },
    }


def _settings(rng: Random) -> dict[str, Any]:
    return {
        "name": rng.choice(SERVICES),
        "version": f"{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 20)}",
        "host": f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
        "port": rng.choice([80, 443, 3000, 5432, 6379, 8000, 8080, 9090]),
        "debug": rng.random() < 0.3,
        "limits": {
            "timeout": rng.randint(1, 120),
            "retries": rng.randint(0, 5),
            "memory_mb": 128 * rng.randint(1, 32),
        },
        "dependencies": {name: f"^{rng.randint(0, 9)}.{rng.randint(0, 20)}.0" for name in rng.sample(SERVICES, 2)},
    }


def _reading(rng: Random) -> dict[str, Any]:
    return {
        "sensor": f"{rng.choice(CITIES).lower()}-{rng.randint(1, 40)}",
        "time": _time(rng),
        "temperature": rng.randint(-200, 400) / 10,
        "humidity": rng.randint(0, 100),
        "samples": [_decimal(rng, 10) for _ in range(rng.randint(2, 6))],
        "ok": rng.random() < 0.9,
        "error": None,
    }


def _page(rng: Random) -> dict[str, Any]:
    rows = [
        {"id": rng.randint(1, 9999), "type": rng.choice(ITEMS), "state": rng.choice(STATUSES)}
        for _ in range(rng.randint(1, 4))
    ]
    return {
        "data": rows,
        "meta": {
            "page": rng.randint(1, 40),
            "per_page": 10 * rng.randint(1, 10),
            "total": rng.randint(1, 9999),
        },
        "next": rng.choice([None, _identifier(rng)]),
    }


def _nested(rng: Random, depth: int = 0) -> dict[str, Any]:
    """Return an object with arbitrary keys, at most three levels deep."""
    keys = rng.sample(ITEMS + COLOURS + SERVICES + STATUSES + TAGS, rng.randint(1, 5))
    return {rng.choice(["{}", "{}_id", "{}_count", "is_{}"]).format(key): _value(rng, depth) for key in keys}


def _value(rng: Random, depth: int) -> Any:
    kind = rng.randint(0, 9 if depth < 2 else 7)
    if kind > 7:
        return _nested(rng, depth + 1)
    return [
        None,
        rng.random() < 0.5,
        rng.randint(0, 9999),
        _decimal(rng, 100),
        rng.choice(CITIES + TAGS),
        f"{rng.choice(COLOURS)}-{rng.choice(ITEMS)}",
        [rng.randint(0, 99) for _ in range(rng.randint(0, 4))],
        rng.sample(NAMES, rng.randint(0, 3)),
    ][kind]


RECORDS: tuple[Callable[[Random], dict[str, Any]], ...] = (
    _user,
    _order,
    _event,
    _product,
    _place,
    _settings,
    _reading,
    _page,
    _nested,
)
