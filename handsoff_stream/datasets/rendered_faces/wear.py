"""Hair, glasses and hats, drawn onto a canvas after the head.

Knows the shapes of hair and accessories in the head's local frame (see `parts`), and their labels. Does not know the
face, how a scene is drawn at random, nor files, datasets or torch.
"""

from dataclasses import replace

import numpy as np

from handsoff_stream.datasets.rendered_faces.hairline import hairness, tucked
from handsoff_stream.datasets.rendered_faces.labels import Part
from handsoff_stream.datasets.rendered_faces.parts import (
    EYE_Y,
    HAT_LINE,
    Stage,
    skull,
)
from handsoff_stream.datasets.rendered_faces.raycast import (
    Array,
    Ellipsoid,
    Frame,
    Hits,
    cast_ellipsoids,
    cast_middle,
    cast_plane,
    rotation,
    smoothstep,
)
from handsoff_stream.datasets.rendered_faces.scene import FaceScene, Glasses, Hair, Hat

HAIR_MIDDLE = 0.10  # z of the border between the parts HAIR_FRONT and HAIR_BEHIND


def _hair_bodies(hair: Hair, scene: FaceScene, frame: Frame) -> list[Ellipsoid]:
    grow = hair.volume if hair.style != "buzz" else 0.045
    radii = (0.85 * scene.width + grow, 0.92 + 0.5 * grow, 0.93 + grow)
    bodies = [Ellipsoid.at(frame, (0, 0.18 + 0.5 * grow, -0.10), radii)]
    if hair.style == "quiff":
        lean = float(0.22 * np.sign(hair.part))
        tilt = rotation(0, 0, -0.6 * lean)
        bodies.append(Ellipsoid.at(frame, (lean, 0.95, 0.38), (0.58, 0.27, 0.44), tilt))
        bodies.append(Ellipsoid.at(frame, (-lean, 0.92, 0.05), (0.60, 0.26, 0.55)))
    if hair.style in ("bob", "long"):
        bodies.append(Ellipsoid.at(frame, (0, -0.30, -0.22), (1.0 + 0.5 * hair.volume, 1.25, 0.86)))
    return bodies


def _crown(hair: Hair, frame: Frame) -> list[Ellipsoid]:
    """Ellipsoids of hair off the scalp, which the hairline does not limit."""
    if hair.style == "bun":
        return [Ellipsoid.at(frame, (0, 1.24, -0.25), (0.36, 0.32, 0.36))]
    if hair.style == "buns":
        return [Ellipsoid.at(frame, (side * 0.72, 0.98, -0.15), (0.33, 0.33, 0.33)) for side in (-1, 1)]
    if hair.style == "bob":
        return [Ellipsoid.at(frame, (0, -0.20, -0.42), (0.97, 0.62 + 0.25 * hair.length, 0.50))]
    if hair.style == "long":
        back = Ellipsoid.at(frame, (0, -0.75, -0.40), (0.98, 1.0 + 0.2 * hair.length, 0.48))
        locks = [
            Ellipsoid.at(frame, (side * 0.80, -0.78, -0.12), (0.25, 0.80 + 0.15 * hair.length, 0.30))
            for side in (-1, 1)
        ]
        return [back, *locks]
    if hair.style == "curly":
        return [_curl(hair, frame, i) for i in range(18)]
    return []


def _curl(hair: Hair, frame: Frame, i: int) -> Ellipsoid:
    """Ball i of 18 on a spiral over the scalp, from the crown down to the ears and the nape."""
    height = 1.0 - 1.05 * (i + 0.5) / 18
    around = 2.39996 * i
    ring = np.sqrt(max(1 - height * height, 0))
    jitter = 0.06 * hair.curl[i]
    x, z = 0.84 * ring * np.sin(around) + jitter[0], 0.84 * ring * np.cos(around) + jitter[1] - 0.22
    y = 0.26 + 0.90 * height + (0.16 if z > 0.35 else 0)
    size = 0.34 + 0.05 * float(hair.curl[i, 2])
    return Ellipsoid.at(frame, (float(x), float(y), float(z)), (size, size, size))


def draw_hair(stage: Stage) -> None:
    """Draw the hair: its shell up to the hairline, then hair off the scalp."""
    scene, hair = stage.scene, stage.scene.hair
    if hair.style == "bald":
        return
    bodies = _hair_bodies(hair, scene, stage.head)
    for body in bodies:
        # Rays that enter the shell where it is cut away may still hit hair further back.
        inner, _ = _grown(stage, cast_middle(stage.camera, body))
        _draw_strands(stage, inner)
    cap, field = _grown(stage, cast_ellipsoids(stage.camera, bodies, blend=0.12))
    # Towards the hairline the normals turn to the face, so that locks look rounded.
    turn = 0.7 * np.exp(field * np.float32(-1 / 0.05))
    normals = cap.normals + stage.head.axes[:, 2:3] * (0.5 * turn) - stage.head.axes[:, 1:2] * (0.6 * turn)
    cap = replace(cap, normals=normals / np.linalg.norm(normals, axis=0))
    _draw_strands(stage, cap)
    crown = _crown(hair, stage.head)
    if crown:
        _draw_strands(stage, cast_ellipsoids(stage.camera, crown, blend=0.12))


def _grown(stage: Stage, hits: Hits) -> tuple[Hits, Array]:
    """The visible hits on the hair's side of the hairline, and their `hairness`."""
    scene, hair = stage.scene, stage.scene.hair
    hits = hits.where(hits.points[2] > stage.canvas.z[hits.index])
    x, y, z = stage.head.to_local(hits.points)
    field = hairness(hair, x, y, z)
    keep = field > 0
    if tucked(hair) or hair.style not in ("bob", "long"):
        # The shell becomes thinner towards its edge, so that it does not stick out from the head's outline there.
        limit = 0.04 + 0.4 * smoothstep(0.0, 0.7, field)
        if hair.style in ("bob", "long"):
            limit += 3 * smoothstep(0.15, -0.05, y)
        clearance = np.sqrt(skull(scene, stage.head).closest(hits.points[0], hits.points[1])) - 1
        keep &= clearance < limit
    return hits.where(keep), field[keep]


def _draw_strands(stage: Stage, hits: Hits) -> None:
    """Draw hits in the hair's color, with broad, soft locks that run down from the crown."""
    scene, hair = stage.scene, stage.scene.hair
    x, y, z = stage.head.to_local(hits.points)
    albedo = np.repeat(hair.color[:, None], len(hits.index), 1)
    if hair.style != "curly":
        around = np.arctan2(x - 0.15 * hair.part, z + 0.25)
        wave = np.sin(13 * around + 2 * hair.part + 1.2 * np.sin(2 * y))
        albedo *= 1 + 0.13 * wave * smoothstep(1.1, 0.8, y)
    exposure = 0.78 + 0.22 * smoothstep(-1.0, 0.3, y)
    if scene.hat is not None:
        hits, albedo, exposure = _under_hat(stage, hits, albedo, exposure)
    z = stage.head.to_local(hits.points)[2]
    part = np.where(z > HAIR_MIDDLE, Part.HAIR_FRONT, Part.HAIR_BEHIND).astype(np.uint8)
    stage.canvas.draw(hits, part, albedo, gloss=0.16, exposure=exposure)


def _under_hat(stage: Stage, hits: Hits, albedo: Array, exposure: Array) -> tuple[Hits, Array, Array]:
    """The hits, albedo and exposure of the hair below a hat's lower edge."""
    _, y, z = stage.head.to_local(hits.points)
    below = HAT_LINE + 0.06 - (y + 0.15 * z)
    keep = below > 0
    shade = 1 - 0.5 * smoothstep(0.30, 0.0, below)
    return hits.where(keep), albedo[:, keep], (exposure * shade)[keep]


def draw_glasses(stage: Stage) -> None:
    """Draw two rims and a bridge in a plane in front of the eyes, and temples back to the ears."""
    scene, glasses = stage.scene, stage.scene.glasses
    if glasses is None:
        return
    spacing, radius, thick = scene.eye_spacing + 0.015, glasses.radius, 0.042
    front = Frame(stage.head.axes, stage.head.to_world((0, EYE_Y - 0.02, 1.0)))
    hits, u, v = cast_plane(stage.camera, front, (spacing + radius + 0.08, radius + 0.08))
    x = np.abs(u) - spacing
    power = 3.2 - 1.2 * glasses.round
    length = (np.abs(x) ** power + np.abs(v / 0.92) ** power) ** (1 / power)
    rim = np.abs(length - radius) < thick
    bridge = (np.abs(u) < spacing - radius + 0.01) & (np.abs(v - 0.06 - 0.05 * np.cos(12 * u)) < thick)
    normals = hits.normals + stage.head.axes[:, 1:2] * ((length - radius) / thick * np.sign(v) * 0.5)
    hits = replace(hits, normals=normals / np.linalg.norm(normals, axis=0))
    stage.canvas.draw(hits.where(rim | bridge), Part.GLASSES, glasses.color, gloss=0.2)
    for side in (-1, 1):
        # The temple on the far side would be visible through its own lens.
        if side * stage.head.axes[2, 0] > -0.15:
            _draw_temple(stage, glasses, side, spacing + radius)


def _draw_temple(stage: Stage, glasses: Glasses, side: int, hinge: float) -> None:
    start = np.array([side * hinge, EYE_Y + 0.05, 1.0])
    end = np.array([side * (0.86 * stage.scene.width + 0.08), EYE_Y + 0.06, -0.05])
    middle, along = (start + end) / 2, end - start
    turn = rotation(float(np.arctan2(along[0], along[2])), 0, 0)
    radii = (0.045, 0.05, float(np.linalg.norm(along)) / 2)
    bar = Ellipsoid.at(stage.head, (float(middle[0]), float(middle[1]), float(middle[2])), radii, turn)
    stage.canvas.draw(cast_ellipsoids(stage.camera, [bar]), Part.GLASSES, glasses.color, gloss=0.2)


def draw_hat(stage: Stage) -> None:
    """Draw a beanie with a rolled cuff, a cap with a visor, or a hat with a brim all around."""
    scene, hat = stage.scene, stage.scene.hat
    if hat is None:
        return
    frame = Frame(stage.head.axes @ rotation(0, -hat.tilt, 0), stage.head.origin)
    grow = 0.03 + scene.hair.volume
    dome = Ellipsoid.at(frame, (0, 0.34, -0.08), (0.85 * scene.width + grow, 0.86 + grow, 0.94 + grow))
    hits = cast_ellipsoids(stage.camera, [dome])
    y = frame.to_local(hits.points)[1]
    band = smoothstep(0.0, 0.02, HAT_LINE + 0.22 - y) * (hat.style == "brimmed")
    albedo = hat.color[:, None] * (1 - band) + hat.band[:, None] * band
    keep = y > HAT_LINE - 0.02
    stage.canvas.draw(hits.where(keep), Part.HAT, albedo[:, keep], gloss=0.04)
    if hat.style == "beanie":
        _draw_cuff(stage, hat, frame, dome)
    else:
        brim = _visor(scene, frame) if hat.style == "cap" else _brim(frame)
        color = hat.band if hat.style == "cap" else hat.color
        stage.canvas.draw(cast_ellipsoids(stage.camera, [brim]), Part.HAT, color, gloss=0.04)


def _draw_cuff(stage: Stage, hat: Hat, frame: Frame, dome: Ellipsoid) -> None:
    """Draw the rolled edge of a beanie, and its bobble."""
    color, middle, half = hat.band, HAT_LINE + 0.12, 0.17
    hits = cast_ellipsoids(stage.camera, [replace(dome, radii=dome.radii + np.float32(0.06))])
    v = (frame.to_local(hits.points)[1] - middle) / half
    hits, v = hits.where(np.abs(v) < 1), v[np.abs(v) < 1]
    normals = hits.normals + frame.axes[:, 1:2] * (v * np.abs(v))
    hits = replace(hits, normals=normals / np.linalg.norm(normals, axis=0))
    stage.canvas.draw(hits, Part.HAT, color, gloss=0.02)
    bobble = Ellipsoid.at(frame, (0, 1.42, -0.15), (0.24, 0.24, 0.24))
    stage.canvas.draw(cast_ellipsoids(stage.camera, [bobble]), Part.HAT, color, gloss=0.02)


def _visor(scene: FaceScene, frame: Frame) -> Ellipsoid:
    tilted = rotation(0, 0.10, 0)
    return Ellipsoid.at(frame, (0, HAT_LINE - 0.05, 0.80), (0.82 * scene.width, 0.07, 0.85), tilted)


def _brim(frame: Frame) -> Ellipsoid:
    return Ellipsoid.at(frame, (0, HAT_LINE, -0.08), (1.45, 0.09, 1.45))
