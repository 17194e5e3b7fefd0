"""In what forms a provider can repeat its key in JSON, and all that a client can read there."""
import json
import re
import urllib.parse
import zlib
from random import Random


def u_escaped(key, rng):
    return "".join(f"\\u{ord(char):04x}" if rng.random() < .5 else char for char in key)


FORMS = {                    # a key -> how it may stand within a JSON string
    "as it is": lambda key: key,
    "all escaped": lambda key: "".join(f"\\u{ord(char):04x}" for char in key),
    "in capitals": lambda key: "".join(f"\\u{ord(char):04X}" for char in key),
    "its first letter": lambda key: f"\\u{ord(key[0]):04x}{key[1:]}",
    "its last": lambda key: f"{key[:-1]}\\u{ord(key[-1]):04x}",
    "mixed": lambda key: u_escaped(key, Random(1)),
    "mixed otherwise": lambda key: u_escaped(key, Random(2)),
    "JSON in JSON": lambda key: json.dumps('{"key":"%s"}' % u_escaped(key, Random(3)))[1:-1],
    "JSON in JSON in JSON": lambda key: json.dumps(json.dumps(u_escaped(key, Random(4))))[1:-1],
    "in a URL": lambda key: "".join(f"%{ord(char):02X}" if char in "-_/+=." else char
                                    for char in key),
    "in a URL in a URL": lambda key: "".join(f"%25{ord(char):02x}" for char in key),
    "JSON in a URL": lambda key: urllib.parse.quote(u_escaped(key, Random(5))),
}


def readable(data, depth=6):
    """All that a client can make of some bytes: as they are, inflated, unescaped, joined."""
    texts = [data.decode("utf-8", "replace")]
    for start in (match.start() for match in re.finditer(rb"\x1f\x8b", data)):
        try:
            texts.append(zlib.decompressobj(47).decompress(data[start:], 100_000).decode(
                "utf-8", "replace"))
        except zlib.error:
            pass
    for text in list(texts):
        for _ in range(depth):
            text = re.sub(r"\\u00([0-9A-Fa-f]{2})", lambda found: chr(int(found[1], 16)), text)
            texts += [text, urllib.parse.unquote(text)]
            text = text.replace('\\"', '"').replace("\\/", "/").replace("\\\\", "\\")
    return "\n".join(texts)
