"""The members of a tar file by their places. Written by hand because tarfile takes ten times as long, in which training
would wait, and follows damaged headers anywhere."""


def is_tar(path):
    with open(path, "rb") as file:
        return file.read(512)[257:262] == b"ustar"


def list_tar(path):
    """-> [(name, offset, size)] of the regular files in a tar, and whether it is complete. Only headers are read, ten
    times as fast as by tarfile; the file is used up to the first thing that cannot be right."""
    members, extended = [], {}
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        offset = file.seek(0)
        while len(header := file.read(512)) == 512 and any(header):
            try:
                size, kind = int(extended.get("size") or tar_number(header[124:136])), header[156:157]
                checksum = 256 + sum(header[:148]) + sum(header[156:])        # its own eight bytes count as blanks
                if checksum != tar_number(header[148:156]) or not 0 <= size <= length - offset - 512:
                    break
                if kind in b"xL":                         # for the next member: attributes (pax), a long name (GNU)
                    content = file.read(size)
                    extended |= {"path": content.rstrip(b"\0")} if kind == b"L" else pax_attributes(content)
                elif kind in b"\0" b"07":
                    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
                    name = extended.get("path") or prefix + b"/" * bool(prefix) + header[:100].split(b"\0")[0]
                    members.append((name.decode("utf-8", "backslashreplace"), offset + 512, size))
            except ValueError:
                break
            extended = extended if kind in b"xL" else {}
            offset = file.seek(offset + 512 + -(-size // 512) * 512)
        rest = header + file.read()                       # a complete tar ends in zeros, 512 bytes or more
    return members, len(rest) >= 512 and not any(rest)


def tar_number(field):
    """Octal digits, or, behind a first byte of 128 or more, a number in binary"""
    if field[0] >= 128:
        return int.from_bytes(field, signed=True) + (1 << 8 * len(field) - 1) if field[0] == 128 else -1
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def pax_attributes(content):
    """Lines '30 path=...' with their own length -> {"path": bytes, "size": bytes}, those that are there"""
    attributes = {}
    while content:
        digits, _, _ = content.partition(b" ")
        line, content = content[:int(digits)], content[int(digits):]
        key, _, value = line[len(digits) + 1:-1].partition(b"=")
        if key in (b"path", b"size"):
            attributes[key.decode()] = value
    return attributes
