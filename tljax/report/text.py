"""Numbers as people read them."""


def thousands(value) -> str:
    """`3,381,726`; `-` for None."""
    return "-" if value is None else f"{int(value):,}"


def counted(count: int, noun: str) -> str:
    """`1 view`, `4 views`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count) -> str:
    """Bytes in binary units with three significant digits: `0 B`, `27.1 MiB`; `-` for None."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def flops(count) -> str:
    """Operations with an SI prefix: `12.3 GFLOP`; `-` for None."""
    if count is None:
        return "-"
    value, unit = float(count), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            break
        value /= 1000
    return f"{value:.3g} {unit}FLOP"


def clock(seconds) -> str:
    """Time left as `0:07`, `12:34`, `3:02:01` or `2 d 4 h`; `-:--` while it is not known."""
    if seconds is None or not 0 <= seconds < float("inf"):
        return "-:--"
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def duration(seconds) -> str:
    """A time spent: `0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 03 min`; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def percent(fraction, digits: int = 1) -> str:
    """`81.2 %`; `-` for None."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def number(value) -> str:
    """A metric in a line: three or four digits from 1e-3 to 1e4, else scientific; integers as they are."""
    if isinstance(value, str) or value is None:
        return "-" if value is None else value
    if isinstance(value, bool) or float(value) != float(value):
        return str(value)
    if isinstance(value, int):
        return thousands(value)
    value = float(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
    return f"{value:.2e}"
