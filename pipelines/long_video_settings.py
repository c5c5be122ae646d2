"""stub to be filled"""


def limit_width(width: int, height: int, max_width: int) -> tuple[int, int]:
    most = min(width, max_width)
    if width > most:
        height = int(most * (height / width))
    return height // 16 * 16, most // 16 * 16
