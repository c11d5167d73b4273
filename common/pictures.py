"""Opening picture files: what Pillow can read becomes an upright 8-bit RGB picture, else one sentence says why."""
import io
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.weights import UserError, check_file, error_text

# What Pillow raises on damaged files.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, struct.error)


Image.init()
FORMATS = [name for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
           if name in Image.OPEN]                         # others may start programs: PostScript does


def open_image(source):
    """A file, bytes or a PIL image -> RGB PIL image: EXIF rotation is applied, transparent parts become white, 16 bits
    become 8. UserError where it is missing, no picture, cut off, or has more pixels than Pillow's MAX_IMAGE_PIXELS."""
    source = io.BytesIO(source) if isinstance(source, bytes) else source
    source = check_file(source) if isinstance(source, (str, Path)) else source
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, at most {Image.MAX_IMAGE_PIXELS:,} are read")
        image.load()
        with suppress(*DAMAGED):                          # damaged EXIF data does not cost the picture
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":                         # integers of 16 bits, also held in 32, and floats
            grey = np.asarray(image, dtype=np.float32)
            white = 65535 if image.mode[0] == "I" else 1 if grey.max() <= 2 else 255
            image = Image.fromarray((grey * (255 / white)).round().clip(0, 255).astype(np.uint8))     # convert() clips
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (Image.DecompressionBombError, *DAMAGED) as error:
        source = "a picture in memory" if isinstance(source, io.BytesIO) else source
        raise UserError(f"{source}: cannot be read as a picture ({error_text(error)})") from None
