"""Draw the bundled sample: 15 classes of Indian clothes in IndoFashion's layout, from nothing but
Pillow. `python data/make_sample.py` rewrites data/sample: with Pillow 13.0.0, byte for byte."""

import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

SPLITS = {"train": 32, "val": 5, "test": 5}  # pictures per class
SUPERSAMPLE = 2  # drawn larger, then reduced: smooth edges

COLOURS = {
    "Red": (190, 30, 45),
    "Maroon": (120, 20, 40),
    "Pink": (232, 110, 160),
    "Orange": (235, 120, 35),
    "Mustard": (214, 160, 30),
    "Yellow": (245, 210, 60),
    "Green": (40, 130, 70),
    "Teal": (20, 120, 125),
    "Blue": (45, 90, 190),
    "Navy Blue": (25, 35, 90),
    "Purple": (110, 50, 140),
    "Grey": (130, 130, 135),
    "Black": (30, 30, 34),
    "Cream": (240, 228, 200),
    "White": (248, 248, 248),
    "Brown": (120, 75, 45),
}
GOLD, SKIN = (205, 165, 70), [(236, 196, 160), (205, 150, 110), (150, 100, 70)]
PATTERNS = ["Solid", "Striped", "Polka Dot", "Checked", "Floral Print", "Woven Design"]
FABRICS = ["Cotton", "Silk Blend", "Georgette", "Rayon", "Art Silk", "Chanderi"]
TITLES = {  # garment, and how a shop's titles call it
    "saree": "Women's {fabric} {pattern} Saree With Blouse Piece",
    "blouse": "Women's {pattern} {fabric} Readymade Saree Blouse",
    "dhoti_pants": "Women {pattern} {fabric} Dhoti Pants",
    "dupattas": "{fabric} {pattern} Dupatta for Women",
    "gowns": "Women's {fabric} {pattern} Anarkali Gown",
    "kurta_men": "Men's {fabric} {pattern} Straight Kurta",
    "leggings_and_salwars": "Women's {pattern} {fabric} Churidar Leggings",
    "lehenga": "{pattern} Semi Stitched {fabric} Lehenga Choli",
    "mojaris_men": "Men's {pattern} Ethnic Mojari Jutti",
    "mojaris_women": "Women {pattern} Embroidered Mojaris",
    "nehru_jackets": "Men's {fabric} {pattern} Nehru Jacket",
    "palazzos": "Women's {fabric} {pattern} Flared Palazzo",
    "petticoats": "Women's {fabric} Saree Petticoat Underskirt",
    "sherwanis": "Men's {fabric} {pattern} Sherwani",
    "women_kurta": "Women {pattern} {fabric} A-Line Kurta",
}
WITHOUT_TITLE = {"sherwanis": 0.4, "lehenga": 0.3, "palazzos": 0.1, "petticoats": 0.1}


class Canvas:
    """A picture drawn in units of its own height, x from the middle, turned as a pose."""

    def __init__(self, rng, background):
        self.height = rng.randint(210, 300) * SUPERSAMPLE
        self.width = int(self.height * rng.uniform(0.7, 0.8))
        self.image = Image.new("RGB", (self.width, self.height), background)
        self.scale, self.flip = rng.uniform(0.96, 1.03), rng.choice([-1, 1])
        self.tilt = rng.uniform(-0.03, 0.03)
        self.dx, self.dy = rng.uniform(-0.015, 0.015), rng.uniform(-0.015, 0.015)
        self.stretch = rng.uniform(0.96, 1.04)

    def place(self, points):
        """(x, y) with x in -0.35..0.35 and y in 0..1 → pixels."""
        placed = []
        for x, y in points:
            x, y = x * self.flip * self.stretch * self.scale, (y - 0.5) * self.scale
            x, y = x - self.tilt * y + self.dx, y + self.tilt * x + self.dy + 0.5
            placed.append((self.width / 2 + x * self.height, y * self.height))
        return placed

    def fill(self, points, colour):
        ImageDraw.Draw(self.image).polygon(self.place(points), fill=colour)

    def line(self, points, colour, width=0.006):
        ImageDraw.Draw(self.image).line(
            self.place(points), fill=colour, width=max(1, int(width * self.height)), joint="curve"
        )

    def dot(self, x, y, radius, colour):
        (px, py), r = self.place([(x, y)])[0], radius * self.height
        ImageDraw.Draw(self.image).ellipse((px - r, py - r, px + r, py + r), fill=colour)

    def cloth(self, points, texture):
        """A polygon filled with the texture instead of one colour."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self.place(points), fill=255)
        self.image.paste(texture, mask=mask)


def mirrored(half):
    """The right half of an outline, from the top down → the whole."""
    return half + [(-x, y) for x, y in reversed(half)]


def shade(colour, factor):
    return tuple(max(0, min(255, int(c * factor))) for c in colour)


def texture(rng, size, pattern, colour, accent):
    """A sheet of printed cloth."""
    sheet = Image.new("RGB", size, colour)
    draw, step = ImageDraw.Draw(sheet), int(size[1] * rng.uniform(0.045, 0.07))
    for row, y in enumerate(range(0, size[1] + step, step)):
        if pattern in ("Striped", "Checked"):
            draw.rectangle((0, y, size[0], y + step // 4), fill=accent)
        for x in range(row % 2 * step // 2, size[0] + step, step):
            if pattern == "Polka Dot":
                draw.ellipse((x, y, x + step // 3, y + step // 3), fill=accent)
            elif pattern == "Checked":
                draw.rectangle((x, y, x + step // 5, y + step), fill=accent)
            elif pattern == "Floral Print":
                for ox, oy in ((0, -1), (1, 0), (0, 1), (-1, 0)):
                    cx, cy, r = x + ox * step / 6, y + oy * step / 6, step / 7
                    draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=accent)
            elif pattern == "Woven Design":
                draw.polygon(
                    [(x, y - step / 4), (x + step / 5, y), (x, y + step / 4), (x - step / 5, y)],
                    fill=accent,
                )
    return sheet


def person(c, skin, hair_long):
    c.fill(mirrored([(0.03, 0.07), (0.03, 0.16), (0.07, 0.18)]), skin)
    if hair_long:
        c.fill(mirrored([(0.045, 0.02), (0.06, 0.08), (0.06, 0.17)]), (35, 25, 22))
    c.dot(0, 0.045, 0.05, (35, 25, 22))
    c.dot(0, 0.062, 0.043, skin)


def sleeves(c, fill, skin, length, width=0.03, spread=0.17):
    """Arms from the shoulders; `length` of them is covered, the rest is skin."""
    for side in (-1, 1):

        def arm(start, end, side=side):
            x0, x1 = 0.085 + (spread - 0.085) * start, 0.085 + (spread - 0.085) * end
            y0, y1 = 0.19 + 0.29 * start, 0.19 + 0.29 * end
            return [
                (side * (x0 - width), y0),
                (side * (x0 + width), y0 - 0.01),
                (side * (x1 + width * 0.8), y1),
                (side * (x1 - width * 0.8), y1),
            ]

        if length < 1:
            c.fill(arm(length, 1), skin)
        if length > 0:
            fill(arm(0, length))


def legs(c, colour, top, bottom=0.96, width=0.035, gap=0.045):
    for side in (-1, 1):
        c.fill(
            [
                (side * (gap - width), top),
                (side * (gap + width), top),
                (side * (gap + width * 0.7), bottom),
                (side * (gap - width * 0.7), bottom),
            ],
            colour,
        )
        c.dot(side * gap * 1.1, bottom + 0.01, 0.022, (60, 40, 30))


def hem(c, y, half_width, colour, height=0.02):
    c.fill(mirrored([(half_width * 0.985, y - height), (half_width, y)]), colour)


def draw_saree(c, rng, cloth, dark, accent, skin):
    person(c, skin, True)
    sleeves(c, lambda p: c.fill(p, dark), skin, 0.4)
    c.fill(mirrored([(0.07, 0.175), (0.085, 0.3), (0.07, 0.36)]), dark)
    c.fill(mirrored([(0.07, 0.35), (0.075, 0.42)]), skin)
    cloth(mirrored([(0.075, 0.41), (0.12, 0.6), (0.15, 0.97)]))
    for x in (-0.03, -0.01, 0.01, 0.03):
        c.line([(x, 0.43), (x * 2.4, 0.96)], dark)
    hem(c, 0.975, 0.151, accent)
    cloth([(-0.08, 0.17), (-0.03, 0.17), (0.1, 0.42), (0.115, 0.55), (0.05, 0.5)])
    c.line([(-0.03, 0.17), (0.1, 0.42), (0.115, 0.55)], accent, 0.014)
    cloth([(-0.09, 0.18), (-0.05, 0.17), (-0.13, 0.5), (-0.15, 0.72), (-0.22, 0.7), (-0.16, 0.45)])
    c.line([(-0.15, 0.72), (-0.22, 0.7)], accent, 0.02)


def draw_blouse(c, rng, cloth, dark, accent, skin):
    cloth(
        mirrored([(0.07, 0.26), (0.19, 0.3), (0.28, 0.5), (0.2, 0.55), (0.16, 0.47), (0.15, 0.72)])
    )
    c.fill(mirrored([(0.07, 0.25), (0.05, 0.36), (0.02, 0.4)]), c.background)
    c.line([(0.07, 0.26), (0.05, 0.36), (0.0, 0.41), (-0.05, 0.36), (-0.07, 0.26)], accent, 0.012)
    c.line([(0, 0.41), (0, 0.71)], dark)
    hem(c, 0.725, 0.15, accent, 0.03)
    for side in (-1, 1):
        c.line([(side * 0.28, 0.5), (side * 0.2, 0.55)], accent, 0.022)


def draw_dhoti_pants(c, rng, cloth, dark, accent, skin):
    cloth(
        mirrored(
            [
                (0.12, 0.14),
                (0.24, 0.42),
                (0.25, 0.6),
                (0.12, 0.86),
                (0.11, 0.92),
                (0.06, 0.92),
                (0.05, 0.84),
                (0.02, 0.74),
            ]
        )
    )
    hem(c, 0.16, 0.125, dark, 0.04)
    for x in (0.03, 0.07, 0.11):
        for side in (-1, 1):
            c.line(
                [(side * x * 0.8, 0.17), (side * x * 1.9, 0.5), (side * (0.07 + x / 4), 0.86)], dark
            )
    for side in (-1, 1):
        c.line([(side * 0.055, 0.9), (side * 0.115, 0.9)], accent, 0.025)


def draw_dupattas(c, rng, cloth, dark, accent, skin):
    for side, bottom in ((-1, 0.9), (1, 0.8)):
        cloth(
            [
                (side * 0.01, 0.1),
                (side * 0.1, 0.13),
                (side * 0.17, bottom - 0.04),
                (side * 0.06, bottom),
            ]
        )
        c.line([(side * 0.17, bottom - 0.08), (side * 0.06, bottom - 0.04)], accent, 0.03)
        for i in range(6):
            x = side * (0.06 + 0.022 * i)
            c.line([(x, bottom - 0.008 * i), (x, bottom + 0.05 - 0.008 * i)], accent)
    c.fill(mirrored([(0.1, 0.1), (0.1, 0.14), (0.03, 0.16)]), dark)
    c.line([(-0.3, 0.1), (0.3, 0.1)], (120, 95, 70), 0.016)


def draw_gowns(c, rng, cloth, dark, accent, skin):
    person(c, skin, True)
    sleeves(c, cloth, skin, 0.95, 0.028)
    cloth(mirrored([(0.08, 0.17), (0.09, 0.25), (0.065, 0.36), (0.2, 0.72), (0.28, 0.97)]))
    c.fill(mirrored([(0.035, 0.165), (0.0, 0.22)]), skin)
    c.line([(-0.066, 0.36), (0.066, 0.36)], accent, 0.025)
    for x in (-0.2, -0.12, -0.04, 0.04, 0.12, 0.2):
        c.line([(x * 0.3, 0.38), (x, 0.96)], dark)
    hem(c, 0.98, 0.283, accent, 0.035)


def draw_kurta_men(c, rng, cloth, dark, accent, skin):
    legs(c, (238, 234, 224), 0.6)
    person(c, skin, False)
    sleeves(c, cloth, skin, 0.9, 0.033)
    cloth(mirrored([(0.035, 0.15), (0.11, 0.185), (0.105, 0.45), (0.115, 0.72)]))
    c.line([(0, 0.16), (0, 0.36)], dark, 0.012)
    for y in (0.2, 0.25, 0.3):
        c.dot(0, y, 0.008, accent)
    for side in (-1, 1):
        c.line([(side * 0.1, 0.56), (side * 0.105, 0.72)], c.background, 0.01)
    c.line([(-0.035, 0.16), (0.035, 0.16)], dark, 0.022)


def draw_leggings_and_salwars(c, rng, cloth, dark, accent, skin):
    cloth(
        mirrored(
            [
                (0.09, 0.08),
                (0.115, 0.24),
                (0.085, 0.55),
                (0.06, 0.93),
                (0.025, 0.93),
                (0.03, 0.55),
                (0.012, 0.3),
            ]
        )
    )
    hem(c, 0.11, 0.095, dark, 0.03)
    for y in (0.8, 0.83, 0.86, 0.89):
        for side in (-1, 1):
            c.line([(side * 0.028, y), (side * 0.062, y - 0.01)], dark)


def draw_lehenga(c, rng, cloth, dark, accent, skin):
    person(c, skin, True)
    sleeves(c, lambda p: c.fill(p, accent), skin, 0.35)
    c.fill(mirrored([(0.075, 0.175), (0.09, 0.24), (0.075, 0.33)]), accent)
    c.fill(mirrored([(0.065, 0.33), (0.07, 0.41)]), skin)
    cloth(mirrored([(0.075, 0.41), (0.24, 0.78), (0.3, 0.95)]))
    for y, w in ((0.945, 0.298), (0.86, 0.27)):
        hem(c, y, w, accent, 0.03)
    c.fill(
        [(0.06, 0.17), (0.09, 0.18), (0.2, 0.55), (0.25, 0.84), (0.19, 0.83), (0.14, 0.5)],
        shade(accent, 0.75),
    )


def draw_mojaris_men(c, rng, cloth, dark, accent, skin):
    for dx, dy in ((0.05, 0.33), (-0.03, 0.6)):  # from the side, the toe curling up

        def at(*points, dx=dx, dy=dy):
            return [(x + dx, y + dy) for x, y in points]

        cloth(
            at(
                (-0.24, -0.07),
                (-0.17, -0.1),
                (-0.1, -0.02),
                (0.02, -0.06),
                (0.14, 0.02),
                (0.22, -0.02),
                (0.24, -0.14),
                (0.28, -0.13),
                (0.28, 0.02),
                (0.2, 0.09),
                (-0.24, 0.09),
            )
        )
        c.fill(at((-0.25, 0.085), (0.2, 0.085), (0.19, 0.115), (-0.25, 0.115)), (70, 45, 30))
        c.fill(at((-0.17, -0.095), (-0.1, -0.015), (0.02, -0.055), (-0.05, -0.1)), shade(dark, 0.6))
        c.line(at((0.02, -0.06), (0.07, 0.08)), accent, 0.014)


def draw_mojaris_women(c, rng, cloth, dark, accent, skin):
    for side in (-1, 1):  # a pair from above

        def at(*points, side=side):
            return [(side * 0.13 + x, y) for x, y in points]

        cloth(
            at(
                (0, 0.12),
                (0.07, 0.26),
                (0.105, 0.42),
                (0.08, 0.62),
                (0.085, 0.78),
                (0.05, 0.88),
                (-0.05, 0.88),
                (-0.085, 0.78),
                (-0.08, 0.62),
                (-0.105, 0.42),
                (-0.07, 0.26),
            )
        )
        c.fill(
            at(
                (0, 0.44),
                (0.06, 0.5),
                (0.055, 0.76),
                (0.03, 0.84),
                (-0.03, 0.84),
                (-0.055, 0.76),
                (-0.06, 0.5),
            ),
            (225, 200, 165),
        )
        c.line(at((-0.06, 0.5), (0, 0.44), (0.06, 0.5)), accent, 0.016)
        c.dot(side * 0.13, 0.32, 0.035, accent)
        c.dot(side * 0.13, 0.32, 0.018, dark)


def draw_nehru_jackets(c, rng, cloth, dark, accent, skin):
    legs(c, (45, 45, 55), 0.62)
    person(c, skin, False)
    sleeves(c, lambda p: c.fill(p, (246, 244, 238)), skin, 0.95, 0.034)
    c.fill(mirrored([(0.1, 0.5), (0.105, 0.65)]), (246, 244, 238))
    cloth(mirrored([(0.04, 0.15), (0.095, 0.185), (0.085, 0.26), (0.115, 0.34), (0.115, 0.54)]))
    c.line([(0, 0.16), (0, 0.54)], dark, 0.01)
    for y in (0.2, 0.27, 0.34, 0.41, 0.48):
        c.dot(0.006, y, 0.01, accent)
    for side in (-1, 1):
        c.line([(side * 0.045, 0.45), (side * 0.095, 0.45)], dark, 0.012)


def draw_palazzos(c, rng, cloth, dark, accent, skin):
    cloth(mirrored([(0.1, 0.1), (0.14, 0.28), (0.29, 0.92), (0.06, 0.93), (0.01, 0.36)]))
    hem(c, 0.14, 0.105, dark, 0.045)
    for x in (0.1, 0.17, 0.23):
        for side in (-1, 1):
            c.line([(side * x * 0.35, 0.2), (side * x, 0.91)], dark)


def draw_petticoats(c, rng, cloth, dark, accent, skin):
    cloth(mirrored([(0.11, 0.16), (0.15, 0.4), (0.22, 0.88)]))
    hem(c, 0.18, 0.113, shade(dark, 1.2), 0.035)
    c.line([(0.02, 0.17), (0.05, 0.3)], (250, 250, 245), 0.01)
    c.line([(0.02, 0.17), (0.0, 0.31)], (250, 250, 245), 0.01)
    for y, w in ((0.72, 0.19), (0.8, 0.205)):
        c.line([(-w, y), (w, y)], dark, 0.008)
    hem(c, 0.89, 0.222, shade(dark, 1.2), 0.04)


def draw_sherwanis(c, rng, cloth, dark, accent, skin):
    legs(c, (225, 205, 160), 0.8, width=0.028)
    person(c, skin, False)
    c.fill(mirrored([(0.055, -0.01), (0.06, 0.035)]), dark)  # the turban
    c.dot(0, 0.0, 0.042, dark)
    sleeves(c, cloth, skin, 0.95, 0.036)
    cloth(mirrored([(0.04, 0.145), (0.12, 0.185), (0.105, 0.42), (0.15, 0.88)]))
    c.line([(-0.04, 0.16), (0.04, 0.16)], accent, 0.03)
    c.line([(0, 0.17), (0, 0.88)], accent, 0.035)
    for y in (0.2, 0.27, 0.34, 0.41, 0.48, 0.55):
        c.dot(0, y, 0.011, dark)
    hem(c, 0.885, 0.152, accent, 0.05)


def draw_women_kurta(c, rng, cloth, dark, accent, skin):
    legs(c, shade(accent, 0.8), 0.7, width=0.026)
    person(c, skin, True)
    sleeves(c, cloth, skin, 0.62, 0.03)
    cloth(mirrored([(0.08, 0.175), (0.085, 0.3), (0.075, 0.38), (0.23, 0.72)]))
    c.fill(mirrored([(0.04, 0.165), (0.025, 0.22), (0.0, 0.25)]), skin)
    c.line([(0.04, 0.17), (0.025, 0.22), (0, 0.25), (-0.025, 0.22), (-0.04, 0.17)], accent, 0.012)
    hem(c, 0.725, 0.231, accent, 0.035)


def draw(label, rng):
    """One picture of the class, and the words that its title is made of."""
    colour_name = rng.choice(list(COLOURS))
    accent_name = rng.choice(
        [name for name in COLOURS if name != colour_name] + ["Gold-Toned"] * 12
    )
    pattern = "Solid" if rng.random() < 0.4 else rng.choice(PATTERNS)
    fabric = rng.choice(FABRICS)
    colour = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[colour_name])
    accent, dark = COLOURS.get(accent_name, GOLD), shade(colour, 0.72 if sum(colour) > 150 else 1.9)
    background = (
        shade((255, 255, 255), rng.uniform(0.86, 1.0))
        if rng.random() < 0.75
        else tuple(rng.randint(185, 245) for _ in range(3))
    )
    if sum(abs(a - b) for a, b in zip(colour, background, strict=True)) < 70:
        background = shade(background, 0.78)
    c = Canvas(rng, background)
    c.background = background
    if rng.random() < 0.3:  # a floor, as in a studio
        ImageDraw.Draw(c.image).rectangle(
            (0, int(c.height * 0.9), c.width, c.height), fill=shade(background, 0.93)
        )
    sheet = texture(
        rng, c.image.size, "Solid" if label == "petticoats" else pattern, colour, accent
    )
    globals()[f"draw_{label}"](
        c, rng, lambda points: c.cloth(points, sheet), dark, accent, rng.choice(SKIN)
    )
    light = Image.linear_gradient("L").resize(c.image.size).point(lambda v: 255 - v // 9)
    picture = ImageChops.multiply(c.image, Image.merge("RGB", (light,) * 3))
    words = {"fabric": fabric, "pattern": pattern, "colour": colour_name, "accent": accent_name}
    return picture.resize(
        (c.width // SUPERSAMPLE, c.height // SUPERSAMPLE), Image.Resampling.LANCZOS
    ), words


def title(label, words, rng):
    """A title in the manner of the real ones: colour first, last or in brackets, some `&amp;`."""
    if rng.random() < WITHOUT_TITLE.get(label, 0.03):
        return "N/A"
    body = TITLES[label].format(**words)
    colours = words["colour"] + (f" &amp; {words['accent']}" if rng.random() < 0.35 else "")
    style = rng.random()
    if style < 0.12:  # sellers repeat themselves
        return TITLES[label].format(fabric="", pattern="Embroidered").replace("  ", " ").strip()
    return (
        f"{colours} {body}"
        if style < 0.5
        else f"{body} ({colours})"
        if style < 0.8
        else f"{body}, {colours}"
    )


def make_sample(folder):
    """Write `{split}_data.json` and `images/{split}/N.jpeg` under `folder`, sorted by class."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, count in SPLITS.items():
        images, rows = folder / "images" / split, []
        images.mkdir(parents=True)
        for number, label in enumerate(label for label in TITLES for _ in range(count)):
            rng = random.Random(f"{split} {number}")
            picture, words = draw(label, rng)
            ending = "png" if rng.random() < 0.04 else rng.choice(["jpeg", "jpeg", "jpg"])
            name = f"images/{split}/{number}.{ending}"
            picture.quantize(64).save(folder / name) if ending == "png" else picture.save(
                folder / name, "JPEG", quality=82
            )
            row = {
                "image_url": "N/A",
                "image_path": name,
                "brand": rng.choice(["Generic", "Rangrez", "Aambal®", "N/A"]),
                "product_title": title(label, words, rng),
                "class_label": label,
            }
            if rng.random() < 1 / 8:
                row["color"] = f"{words['colour']}, {words['accent']}"
            rows.append(json.dumps(row, ensure_ascii=False))
        (folder / f"{split}_data.json").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_sample(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "sample")
