"""Head, ears and body, drawn onto a canvas.

Knows the anatomy in the head's local frame, and the label of each part. Does not know hair and accessories (`wear`),
how a scene is drawn at random, nor files, datasets or torch.

Head frame: origin between the ears, x to the image's right in a frontal pose, y up, z out of the face; the unit is the
head radius. Flat features (eyes, brows, mouth) are painted onto the head: they are curves in the frame's x-y plane, so
they move with the surface.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handsoff_stream.datasets.rendered_faces.canvas import Canvas, Light, soft_shadow
from handsoff_stream.datasets.rendered_faces.hairline import hairness, tucked
from handsoff_stream.datasets.rendered_faces.labels import Part
from handsoff_stream.datasets.rendered_faces.raycast import (
    Array,
    Blob,
    Camera,
    Ellipsoid,
    Frame,
    Hits,
    Surface,
    cast_ellipsoids,
    rotation,
    smoothstep,
)
from handsoff_stream.datasets.rendered_faces.scene import FaceScene, linear

EYE_Y, MOUTH_Y, HAT_LINE = -0.02, -0.71, 0.50
_WHITE = np.array([0.86, 0.86, 0.88], np.float32)


@dataclass(frozen=True)
class Stage:
    """A scene, its camera and canvas, and the local frames of head and body."""

    scene: FaceScene
    camera: Camera
    canvas: Canvas
    head: Frame
    body: Frame


def make_stage(scene: FaceScene, size: int) -> Stage:
    """A stage with an empty canvas of size x size pixels."""
    camera = Camera(size, scene.scale * size, scene.x0 * size, scene.y0 * size)
    light = Light(scene.light_direction, scene.light_color, scene.ambient)
    origin = np.zeros(3, np.float32)
    head = Frame(rotation(scene.yaw, -scene.pitch, scene.roll), origin)
    body = Frame(rotation(0.35 * scene.yaw, 0, 0.25 * scene.roll), origin)
    return Stage(scene, camera, Canvas(camera, light), head, body)


def skull(scene: FaceScene, frame: Frame) -> Ellipsoid:
    """The ellipsoid of the skull, without face and jaw; `frame`: of the head."""
    return Ellipsoid.at(frame, (0, 0.18, -0.10), (0.85 * scene.width, 0.92, 0.93))


def _face(scene: FaceScene, frame: Frame) -> Blob:
    """The head without nose and ears."""
    jaw = Ellipsoid.at(frame, (0, -0.40, 0.08), (0.60 * scene.jaw * scene.width, 0.66 - scene.chin, 0.68))
    cheeks = [Ellipsoid.at(frame, (side * 0.34, -0.34, 0.40), (0.30 * scene.cheeks, 0.30, 0.32)) for side in (-1, 1)]
    chin = Ellipsoid.at(frame, (0, -0.90 + scene.chin, 0.42), (0.24 * scene.jaw, 0.17, 0.22))
    return Blob([skull(scene, frame), jaw, *cheeks, chin], [7.0, 4.5, 1.6, 1.6, 1.5])


def nose_tip(scene: FaceScene) -> tuple[float, float, float]:
    """Center of the ellipsoid of the nose's tip, in the head frame."""
    return (0, -0.36 - scene.nose_length, 0.97)


def _nose_bodies(scene: FaceScene, frame: Frame) -> list[tuple[Ellipsoid, float]]:
    _, y, z = nose_tip(scene)
    size = scene.nose
    bridge = Ellipsoid.at(frame, (0, y + 0.21, z - 0.08), (0.085, 0.27, 0.10), rotation(0, -0.30, 0))
    tip = Ellipsoid.at(frame, (0, y, z), (0.14 * size, 0.125 * size, 0.15))
    wings = [
        Ellipsoid.at(frame, (side * 0.115 * size, y - 0.035, z - 0.08), (0.085 * size, 0.08, 0.10)) for side in (-1, 1)
    ]
    return [(bridge, 0.10), (tip, 0.08), (wings[0], 0.04), (wings[1], 0.04)]


def face_z(scene: FaceScene, x: Array, y: Array) -> Array:
    """Local z of the face, without nose and ears, at points of the head frame's x-y plane, [P] each."""
    straight = Frame(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    return _face(scene, straight).solve(x, y)[0]


def draw_head(stage: Stage) -> None:
    """Draw the skin, the nose, and the features painted on them."""
    scene = stage.scene
    face, nose = _face(scene, stage.head), _nose_bodies(scene, stage.head)
    surface = Surface(stage.camera, face.bodies + [body for body, _ in nose])
    surface.add_blob(face)
    for body, blend in nose:
        surface.add(body, blend=blend, share=1.0)
    hits = surface.hits()
    local = stage.head.to_local(hits.points)
    paint = _Paint(hits, local, scene, stage.head)
    paint.skin()
    paint.regions()
    paint.nose()
    for side in (-1, 1):
        paint.brow(side)
        paint.eye(side)
    paint.beard()
    paint.mouth()
    tip = Ellipsoid.at(stage.head, nose_tip(scene), (0.15, 0.15, 0.15))
    behind = smoothstep(0.55, 0.35, hits.share)
    shadow = soft_shadow(hits.points, scene.light_direction, tip, strength=0.45, softness=0.7)
    paint.exposure *= 1 - behind * (1 - shadow)
    stage.canvas.draw(hits, paint.label, paint.albedo, gloss=paint.gloss, exposure=paint.exposure)


class _Paint:
    """The head's visible samples and their material, which each method changes for one feature."""

    def __init__(self, hits: Hits, local_3P: Array, scene: FaceScene, head: Frame) -> None:
        self.hits, self.scene, self.head = hits, scene, head
        self.x, self.y, self.z = local_3P
        self.front = self.z > 0.2
        count = len(hits.index)
        self.label = np.full(count, Part.SKIN, np.uint8)
        self.albedo = np.repeat(scene.skin[:, None], count, 1)
        self.gloss = np.full(count, 0.10, np.float32)
        self.exposure = np.ones(count, np.float32)

    def _set(self, where: NDArray[Any], label: int | NDArray[np.uint8], albedo: Array, gloss: float) -> None:
        self.label[where] = label
        self.albedo[:, where] = albedo[:, None] if albedo.ndim == 1 else albedo
        self.gloss[where] = gloss

    def skin(self) -> None:
        """Blush, and soft shadows in the eye sockets, under the lip and at the hairline."""
        scene = self.scene
        across = np.abs(self.x)
        warm = np.exp(-(((across - 0.46) / 0.20) ** 2) - ((self.y + 0.40) / 0.17) ** 2) * self.front
        tint = np.array([1.06, 0.74, 0.72], np.float32)
        self.albedo *= 1 + (0.75 * scene.blush * warm) * (tint - 1)[:, None]
        socket = np.exp(-(((across - scene.eye_spacing + 0.03) / 0.25) ** 2) - ((self.y - 0.06) / 0.19) ** 2)
        fold = np.exp(-((self.x / 0.2) ** 2) - ((self.y - MOUTH_Y + 0.17 + scene.mouth_open) / 0.05) ** 2)
        self.exposure *= 1 - (0.20 * socket + 0.18 * fold) * self.front
        if scene.hair.style != "bald":
            near = smoothstep(-0.22, 0.05, hairness(scene.hair, self.x, self.y, self.z))
            self.exposure *= 1 - 0.45 * near
        if scene.hat is not None:
            self.exposure *= 1 - 0.5 * smoothstep(HAT_LINE - 0.30, HAT_LINE, self.y + 0.15 * self.z)

    def regions(self) -> None:
        """Labels of the skin's regions, which differ only in their position on the face."""
        scene, x, y = self.scene, self.x, self.y
        across = np.abs(x)
        tip = nose_tip(scene)[1]

        def mark(where: NDArray[np.bool_], name: str) -> None:
            self.label[where & self.front] = Part[name]

        def mark_sides(where: NDArray[np.bool_], name: str) -> None:
            mark(where & (x < 0), f"{name}_LEFT")
            mark(where & (x >= 0), f"{name}_RIGHT")

        mark((y > scene.brow_height) & (across < 0.62), "FOREHEAD")
        mark_sides(((across - 0.44) / 0.24) ** 2 + ((y + 0.42) / 0.22) ** 2 < 1, "CHEEK")
        mark_sides(((across - scene.eye_spacing) / 0.28) ** 2 + ((y - EYE_Y - 0.04) / 0.24) ** 2 < 1, "EYELID")
        mark((across < 0.20) & (y < tip) & (y > MOUTH_Y), "PHILTRUM")
        mark((x / 0.30) ** 2 + ((y + 1.0 - scene.chin) / 0.18) ** 2 < 1, "CHIN")

    def nose(self) -> None:
        """Labels of the nose, which is slightly redder than the skin, and its nostrils."""
        _, tip, _ = nose_tip(self.scene)
        rosy = np.array([1.03, 0.86, 0.84], np.float32)
        share = self.hits.share
        warm = smoothstep(0.2, 0.9, share) * smoothstep(0.25, -0.15, self.y - tip)
        self.albedo *= 1 + warm * (rosy - 1)[:, None]
        part = np.where(self.y > tip + 0.13, Part.NOSE_BRIDGE, Part.NOSE_TIP)
        wing = (np.abs(self.x) > 0.10 * self.scene.nose) & (self.y < tip + 0.07)
        part = np.where(wing, np.where(self.x < 0, Part.NOSTRIL_LEFT, Part.NOSTRIL_RIGHT), part)
        inside = (share > 0.5) & self.front
        self.label[inside] = part[inside]
        self.gloss += 0.06 * share
        across = (np.abs(self.x) - 0.085 * self.scene.nose) / 0.05
        under = across**2 + ((self.y - tip + 0.115) / 0.035) ** 2
        self.exposure *= 1 - 0.6 * smoothstep(1.6, 0.4, under) * self.front

    def brow(self, side: int) -> None:
        """One brow; `side`: -1 left, 1 right."""
        scene = self.scene
        u = (side * self.x - scene.eye_spacing - 0.01) / scene.brow_width
        middle = scene.brow_height + scene.brow_arch * (1 - (u - 0.15) ** 2) + scene.brow_tilt * u
        thickness = scene.brow_thickness * np.clip(1.05 - 0.40 * np.clip(u, 0, 1) ** 2, 0, 1)
        v = (self.y - middle) / thickness
        where = (u * u * u * u + v * v < 1) & self.front
        self._set(where, Part.of_side("BROW", side), scene.brow_color, 0.03)

    def eye(self, side: int) -> None:
        """Sclera, iris, pupil, highlight and lashes of one eye; `side`: -1 left, 1 right."""
        scene = self.scene
        x, y = self.x - side * scene.eye_spacing, self.y - EYE_Y
        u = side * x / scene.eye_width
        y = y - scene.eye_tilt * scene.eye_width * u
        v = y / scene.eye_height
        bow = np.clip(1 - u * u, 0, None)
        upper, lower = np.sqrt(bow) * (0.7 + 0.3 * bow), -0.85 * bow**0.7
        crease = np.exp(-(((v - upper - 0.42) / 0.16) ** 2)) * (bow > 0)
        self.exposure *= 1 - 0.28 * crease * self.front
        inside = np.flatnonzero((bow > 0) & (v < upper + 0.20 * np.sqrt(bow)) & (v > lower) & self.front)
        if len(inside) == 0:
            return
        gx, gy = scene.gaze
        distance = np.hypot(x[inside] - gx, (y[inside] - gy))
        radius = 0.60 * scene.eye_height + 0.038
        depth = (upper - v)[inside]
        albedo = np.repeat(_WHITE[:, None], len(inside), 1)
        ring = smoothstep(radius, 0.6 * radius, distance)
        iris = scene.iris[:, None] * (0.55 + 0.9 * ring)
        albedo = np.where(distance < radius, iris, albedo)
        albedo = np.where(distance < 0.52 * radius, np.float32(0.006), albedo)
        glint = np.hypot(x[inside] - gx - 0.045 * np.sign(scene.light_direction[0]), y[inside] - gy - 0.05)
        albedo = np.where(glint < 0.036, np.float32(1.0), albedo)
        albedo = np.where(depth < 0, scene.brow_color[:, None] * 0.35, albedo)
        part = np.where(distance < radius, Part.of_side("IRIS", side), Part.of_side("SCLERA", side))
        part = np.where(distance < 0.52 * radius, Part.of_side("PUPIL", side), part)
        part = np.where(depth < 0, Part.of_side("LASHES", side), part)
        self._set(inside, part.astype(np.uint8), albedo, 0.0)
        self.exposure[inside] = 1 - 0.5 * smoothstep(0.55, 0.0, depth)
        ball = np.stack([x[inside], y[inside], np.full(len(inside), 0.26, np.float32)])
        self.hits.normals[:, inside] = self.head.axes @ (ball / np.linalg.norm(ball, axis=0))

    def beard(self) -> None:
        """The beard, painted onto the skin around the mouth and on the jaw."""
        beard = self.scene.beard
        if beard is None:
            return
        x, y, size = np.abs(self.x), self.y, beard.size
        lip = MOUTH_Y + 0.10 + 0.5 * self.scene.mouth_open
        moustache = (x < 0.30 * size) & (np.abs(y - lip - 0.05 + 0.25 * x) < 0.065 * size)
        chin = (x / (0.26 * size)) ** 2 + ((y + 0.95 - self.scene.chin) / 0.20) ** 2 < 1
        cheeks = y < -0.42 - 0.30 * np.clip(1 - (x / 0.55) ** 2, 0, 1) + 0.1 * (size - 1)
        where = {"moustache": moustache, "goatee": moustache | chin}.get(beard.style, moustache | chin | cheeks)
        where = where & (self.z > 0.0) & (self.hits.share < 0.5)
        color = beard.color[:, None]
        if beard.style == "stubble":
            color = 0.55 * self.albedo[:, where] + 0.45 * color
        else:
            color = color * (1 + 0.18 * np.sin(38 * self.x[where] + 9 * y[where]))
        self._set(where, Part.BEARD, color.astype(np.float32) * np.ones(int(where.sum()), np.float32), 0.03)

    def mouth(self) -> None:
        """Lips along the curve of the smile; for an open mouth also its dark inside with teeth and tongue."""
        scene = self.scene
        u = self.x / scene.mouth_width
        bow = np.clip(1 - u * u, 0, None)
        half = scene.mouth_open * bow**0.6
        y = self.y - MOUTH_Y - scene.smile * (u * u - 0.35)
        cupid = 1 - 0.22 * np.exp(-((u / 0.16) ** 2))
        upper, lower = scene.lips * bow**0.55 * cupid, 1.25 * scene.lips * bow**0.6
        where = np.flatnonzero((bow > 0) & (y < half + upper) & (y > -half - lower) & self.front)
        if len(where) == 0:
            return
        y, half, upper, lower = y[where], half[where], upper[where], lower[where]
        above = y > 0
        profile = np.where(above, (y - half) / (upper + 1e-4), (-half - y) / (lower + 1e-4))
        albedo = scene.lip_color[:, None] * np.where(above, 0.80, 1.0)
        inner = profile < 0
        teeth = inner & (y > half - 0.065) & (half > 0.03)
        tongue = inner & (y < -0.3 * half) & (np.abs(u[where]) < 0.6)
        albedo = np.where(inner, linear("3a1013")[:, None], albedo)
        albedo = np.where(tongue, linear("b4524f")[:, None], albedo)
        albedo = np.where(teeth, _WHITE[:, None], albedo)
        seam = (scene.mouth_open == 0) & (np.abs(y) < 0.022)
        albedo = np.where(seam, scene.lip_color[:, None] * 0.25, albedo)
        part = np.where(inner, Part.MOUTH_INSIDE, np.where(above, Part.UPPER_LIP, Part.LOWER_LIP))
        part = np.where(teeth, Part.TEETH, part)
        self._set(where, part.astype(np.uint8), albedo, 0.0)
        self.gloss[where] = np.where(inner, 0.0, 0.07)
        self.exposure[where] = np.where(inner, 1 - 0.25 * smoothstep(0.05, 0.0, half - y), 1.0)
        bulge = np.where(inner, 0, np.where(above, 0.55, -0.65) * (2 * profile - 0.9)).astype(np.float32)
        normals = self.hits.normals[:, where] + self.head.axes[:, 1:2] * bulge
        self.hits.normals[:, where] = normals / np.linalg.norm(normals, axis=0)


def draw_ears(stage: Stage) -> None:
    """Draw both ears, unless long hair covers them."""
    scene = stage.scene
    if scene.hair.style in ("bob", "long") and not tucked(scene.hair):
        return
    for side in (-1, 1):
        turn = rotation(side * 0.95, 0, side * -0.12)
        center = (side * (0.86 * scene.width + 0.06), -0.10, -0.08)
        ear = Ellipsoid.at(stage.head, center, (0.19 * scene.ears, 0.27 * scene.ears, 0.09), turn)
        hits = cast_ellipsoids(stage.camera, [ear])
        u, v, _ = (ear.axes.T @ (hits.points - ear.center[:, None])) / ear.radii[:, None]
        inner = smoothstep(1.0, 0.35, ((u - side * 0.05) / 0.62) ** 2 + ((v - 0.08) / 0.66) ** 2)
        rosy = np.array([1.02, 0.84, 0.80], np.float32)
        albedo = (scene.skin * rosy)[:, None] * (1 - 0.35 * inner)
        part = np.where(inner > 0.5, Part.of_side("CONCHA", side), Part.of_side("EAR", side)).astype(np.uint8)
        stage.canvas.draw(hits, part, albedo, gloss=0.08, exposure=1 - 0.45 * inner)


def draw_body(stage: Stage) -> None:
    """Draw neck and clothing, which belong to the class background but hide what is behind them."""
    scene, light = stage.scene, stage.scene.light_direction
    head = Ellipsoid.at(stage.head, (0, -0.25, 0.05), (0.80, 0.95, 0.85))
    neck = cast_ellipsoids(stage.camera, [Ellipsoid.at(stage.body, (0, -1.35, -0.20), (0.40, 1.10, 0.40))])
    shadow = soft_shadow(neck.points, light, head, strength=0.55, softness=0.5)
    fold = 1 - 0.45 * smoothstep(-1.5, -1.0, neck.points[1])
    stage.canvas.draw(neck, Part.NECK, scene.skin * 0.92, gloss=0.05, exposure=shadow * fold)
    torso = Ellipsoid.at(stage.body, (0, -2.50, -0.30), (1.60, 1.0, 0.75))
    collar = Ellipsoid.at(stage.body, (0, -1.58, -0.20), (0.54, 0.16 + scene.collar_width, 0.53))
    surface = Surface(stage.camera, [torso, collar])
    surface.add(torso, blend=0.05)
    surface.add(collar, blend=0.05, share=1.0)
    hits = surface.hits()
    mix = smoothstep(0.4, 0.6, hits.share)
    albedo = _cloth(stage, hits) * (1 - mix) + scene.collar[:, None] * mix
    shadow = soft_shadow(hits.points, light, head, strength=0.4, softness=0.5)
    part = np.where(mix > 0.5, Part.COLLAR, Part.CLOTHING).astype(np.uint8)
    stage.canvas.draw(hits, part, albedo, gloss=0.02, exposure=shadow)


def _cloth(stage: Stage, hits: Hits) -> Array:
    """Color of the clothing, with its pattern: linear [3, P] or [3, 1]."""
    scene, pattern = stage.scene, stage.scene.pattern
    if pattern is None:
        return scene.cloth[:, None]
    u, v, _ = stage.body.to_local(hits.points) * pattern.frequency
    along, across = np.cos(pattern.angle), np.sin(pattern.angle)
    first, second = np.sin(along * u + across * v), np.sin(along * v - across * u)
    field = {"stripes": first, "checks": first * second, "dots": first + second - 0.9}[pattern.style]
    share = smoothstep(-0.15, 0.15, field.astype(np.float32))
    return np.asarray(scene.cloth[:, None] * (1 - share) + pattern.color[:, None] * share, np.float32)
