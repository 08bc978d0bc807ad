"""Ray casting of ellipsoids and planes under an orthographic camera.

Knows projection, intersection and smooth union. Does not know colors and class ids (`canvas`), faces, or random
numbers.

World coordinates are right-handed: x right, y up, z towards the camera; rays run along -z. Arrays are float32. Shape
letters: P hit samples, 3 the axes x, y, z. A body's F(p) = (p - center)^T A (p - center) is 1 on its surface and less
inside.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Index = NDArray[np.intp]
Window = tuple[slice, slice]

SUPERSAMPLES = 2  # per pixel along each axis, so four rays per pixel
MISS = np.float32(-1e4)  # z of a ray that hits nothing


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """Local => world matrix float32 [3, 3]: rotates about y by yaw, then about x by pitch, then about z by roll.

    Angles are in radians.
    """
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, np.float32)


def smoothstep(low: float, high: float, value: Array) -> Array:
    """Elementwise Hermite step from 0 at `low` to 1 at `high`, constant beyond them; `low` may be the larger one."""
    t = np.clip((value - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


@dataclass(frozen=True)
class Frame:
    """A rigid frame: the local point p is `origin + axes @ p` in world coordinates."""

    axes: Array  # [3, 3], columns are the local axes
    origin: Array  # [3]

    def to_world(self, point: tuple[float, float, float]) -> Array:
        """World coordinates [3] of a local point."""
        return self.origin + self.axes @ np.asarray(point, np.float32)

    def to_local(self, points_3P: Array) -> Array:
        """Local coordinates [3, P] of world points."""
        return self.axes.T @ (points_3P - self.origin[:, None])


@dataclass(frozen=True)
class Ellipsoid:
    """Center [3], radii along the local axes [3] and the axes [3, 3] (columns), in world coordinates."""

    center: Array
    radii: Array
    axes: Array

    @staticmethod
    def at(
        frame: Frame,
        center: tuple[float, float, float],
        radii: tuple[float, float, float],
        turn: Array | None = None,
    ) -> "Ellipsoid":
        """An ellipsoid given in a frame's coordinates; its axes are the frame's, turned by `turn` [3, 3]."""
        axes = frame.axes if turn is None else frame.axes @ turn
        return Ellipsoid(frame.to_world(center), np.asarray(radii, np.float32), axes)

    def quadric(self) -> Array:
        """Symmetric A [3, 3] with (p - center)^T A (p - center) = 1 on the surface."""
        return np.asarray((self.axes / self.radii**2) @ self.axes.T, np.float32)

    def half_extent(self) -> Array:
        """Half width and half height [2] of the bounding box of the ellipsoid's projection."""
        return np.asarray(np.sqrt((self.axes[:2] ** 2) @ (self.radii**2)), np.float32)

    def closest(self, x: Array, y: Array) -> Array:
        """The smallest F along the rays at world x and y, which broadcast; below 1 where a ray hits."""
        shadow = np.linalg.inv(((self.axes * self.radii**2) @ self.axes.T)[:2, :2]).astype(np.float32)
        dx, dy = x - self.center[0], y - self.center[1]
        least = (shadow[0, 0] * dx) * dx + (shadow[1, 1] * dy) * dy + (2 * shadow[0, 1] * dx) * dy
        return np.asarray(least, np.float32)


@dataclass(frozen=True)
class Camera:
    """Orthographic camera of size x size pixels: `scale` pixels per world unit, the world's origin at (x0, y0).

    x0 and y0 are pixels from the image's top left corner.
    """

    size: int
    scale: float
    x0: float
    y0: float

    @property
    def side(self) -> int:
        """Number of samples along one side of the image."""
        return self.size * SUPERSAMPLES

    def project(self, point: Array) -> tuple[float, float]:
        """World point [3] => pixel coordinates (x, y), with pixel centers at integers."""
        return (
            float(self.x0 + self.scale * point[0] - 0.5),
            float(self.y0 - self.scale * point[1] - 0.5),
        )

    def window(self, center: Array, half_extent: Array) -> Window:
        """(rows, columns) of the samples whose rays may hit a box around `center`; they may be empty.

        Args:
            center: world coordinates; the first two are used.
            half_extent: [2], half width and half height in world units.
        """
        density = self.scale * SUPERSAMPLES
        column = self.x0 * SUPERSAMPLES + density * center[0]
        row = self.y0 * SUPERSAMPLES - density * center[1]
        reach = density * half_extent + 1

        def clamp(value: float) -> int:
            return int(min(max(value, 0), self.side))

        return (
            slice(clamp(row - reach[1]), clamp(row + reach[1] + 1)),
            slice(clamp(column - reach[0]), clamp(column + reach[0] + 1)),
        )

    def rays(self, window: Window) -> tuple[Array, Array]:
        """World x [columns] and y [rows] of the window's rays."""
        step = 1 / (self.scale * SUPERSAMPLES)
        columns = np.arange(window[1].start, window[1].stop) + 0.5
        rows = np.arange(window[0].start, window[0].stop) + 0.5
        x = (columns - self.x0 * SUPERSAMPLES) * step
        y = (self.y0 * SUPERSAMPLES - rows) * step
        return x.astype(np.float32), y.astype(np.float32)


@dataclass(frozen=True)
class Hits:
    """Where rays hit a surface.

    index: sample index [P]. points: world coordinates [3, P]. normals: unit normals [3, P]. share: [P], see `Surface`.
    """

    index: Index
    points: Array
    normals: Array
    share: Array

    def where(self, keep: NDArray[np.bool_]) -> "Hits":
        """The hits at which `keep`, bool [P], is true."""
        kept = np.flatnonzero(keep)
        return Hits(self.index[kept], self.points.take(kept, 1), self.normals.take(kept, 1), self.share[kept])


class Surface:
    """The visible surface of a smooth union of ellipsoids.

    Depths are combined by a polynomial smooth maximum of width `blend` in world units; normals and `share` are averaged
    with its weights. `share` in [0, 1] says how much of the surface belongs to ellipsoids that were added with share 1.

    Args:
        camera: whose rays hit the surface.
        bodies: ellipsoids whose bounding boxes contain everything that is added later.
    """

    def __init__(self, camera: Camera, bodies: list[Ellipsoid]) -> None:
        windows = [camera.window(body.center, body.half_extent()) for body in bodies]
        rows = slice(min(w[0].start for w in windows), max(w[0].stop for w in windows))
        columns = slice(min(w[1].start for w in windows), max(w[1].stop for w in windows))
        self.camera, self.window = camera, (rows, columns)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        self.z = np.full(shape, MISS, np.float32)
        self.normals = np.zeros((3, *shape), np.float32)
        self.share = np.zeros(shape, np.float32)

    def add(self, body: Ellipsoid, *, blend: float, share: float = 0.0) -> None:
        """Add one ellipsoid, which must lie within the bounding box of `bodies`."""
        window = self.camera.window(body.center, body.half_extent())
        if window[0].start >= window[0].stop or window[1].start >= window[1].stop:
            return
        z, normals = _cast(self.camera, window, body)
        own = (
            slice(window[0].start - self.window[0].start, window[0].stop - self.window[0].start),
            slice(window[1].start - self.window[1].start, window[1].stop - self.window[1].start),
        )
        before = self.z[own]
        weight = np.clip(0.5 + (z - before) * np.float32(0.5 / blend), 0, 1)
        self.z[own] = before + weight * (z - before) + np.float32(blend) * weight * (1 - weight)
        normals -= self.normals[(slice(None), *own)]
        normals *= weight
        self.normals[(slice(None), *own)] += normals
        self.share[own] += weight * (np.float32(share) - self.share[own])

    def add_blob(self, blob: "Blob") -> None:
        """Add a blob; call this before `add`."""
        x, y = self.camera.rays(self.window)
        closest = np.minimum.reduce([body.closest(x[None], y[:, None]) for body in blob.bodies])
        flat = np.flatnonzero(closest < 1.3)  # a blob extends slightly beyond its bodies, but not this far
        _, x, y = _locate(self.camera, self.window, flat)
        z, normals, hit = blob.solve(x, y)
        flat = flat[hit]
        self.z.reshape(-1)[flat] = z[hit]
        self.normals.reshape(3, -1)[:, flat] = normals[:, hit]

    def hits(self) -> Hits:
        """All hits of the surface."""
        flat = np.flatnonzero(self.z > MISS / 2)
        normals = self.normals.reshape(3, -1).take(flat, 1)
        normals /= np.sqrt(np.einsum("ap,ap->p", normals, normals)) + np.float32(1e-6)
        index, x, y = _locate(self.camera, self.window, flat)
        return Hits(index, np.stack([x, y, self.z.ravel()[flat]]), normals, self.share.ravel()[flat])


def _locate(camera: Camera, window: Window, flat: Index) -> tuple[Index, Array, Array]:
    """Positions within a window => sample index, world x and y, [P] each."""
    row, column = np.divmod(flat, window[1].stop - window[1].start)
    x, y = camera.rays(window)
    index = (row + window[0].start) * camera.side + column + window[1].start
    return index, x[column], y[row]


@dataclass(frozen=True)
class Blob:
    """The level set sum_i exp(sharpness_i * (1 - F_i(p))) = 1: ellipsoids that blend smoothly into each other.

    It lies slightly outside its bodies, and further outside where several overlap.
    """

    bodies: list[Ellipsoid]
    sharpness: list[float]

    def solve(self, x_P: Array, y_P: Array, *, steps: int = 2) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Nearest surface points of rays: z [P], unit normals [3, P], and whether each ray hits, bool [P].

        Each step replaces the logarithm of the sum along the ray by the parabola with the same value, slope and
        curvature, and moves to its nearer root. With a single ellipsoid the logarithm is a parabola.
        """
        z = np.full(len(x_P), MISS, np.float32)
        exponents = []  # k0 + k1 z + k2 z^2 along the ray
        for body, sharp in zip(self.bodies, self.sharpness, strict=True):
            q, x, y, z0 = body.quadric(), x_P - body.center[0], y_P - body.center[1], body.center[2]
            slope = q[0, 2] * x + q[1, 2] * y
            level = q[0, 0] * x * x + q[1, 1] * y * y + (2 * q[0, 1]) * x * y
            depth = slope * slope - q[2, 2] * (level - 1)
            # Start at the nearest hit; for bodies that the ray misses, `start` lies further back.
            start = (np.copysign(np.sqrt(np.abs(depth)), depth) - slope) / q[2, 2]
            np.maximum(z, z0 + start, out=z)
            k2 = -sharp * q[2, 2]
            k1 = -2 * (sharp * slope + k2 * z0)
            exponents.append((sharp * (1 - level) + z0 * (2 * sharp * slope + k2 * z0), k1, k2))
        for _ in range(steps):
            total = slope = curve = np.float32(0)
            for k0, k1, k2 in exponents:
                weight = np.exp((k2 * z + k1) * z + k0)
                along = (2 * k2) * z + k1
                total = total + weight
                slope = slope + weight * along
                curve = curve + weight * (along * along + 2 * k2)
            slope, level = slope / total, np.log(total)
            root = slope * slope - 2 * level * (curve / total - slope * slope)
            gap = np.sqrt(np.maximum(root, 0)) - slope
            z = z + np.clip(2 * level / np.where(np.abs(gap) < 1e-3, np.float32(1e-3), gap), -0.2, 0.2)
        return z, *self._normals(np.stack([x_P, y_P, z]), exponents)

    def _normals(
        self, points_3P: Array, exponents: list[tuple[Array, Array, np.float32]]
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Unit normals [3, P] and whether the points lie on the surface [P]."""
        normals, total, z = np.zeros_like(points_3P), np.float32(0), points_3P[2]
        for body, sharp, (k0, k1, k2) in zip(self.bodies, self.sharpness, exponents, strict=True):
            weight = np.exp((k2 * z + k1) * z + k0)
            total = total + weight
            normals += (sharp * weight) * (body.quadric() @ (points_3P - body.center[:, None]))
        normals /= np.sqrt(np.einsum("ap,ap->p", normals, normals)) + np.float32(1e-6)
        return normals, np.abs(total - 1) < 0.06


def cast_middle(camera: Camera, body: Ellipsoid) -> Hits:
    """The points where rays are deepest inside a body, with the normals of its outline tilted towards the camera."""
    window = camera.window(body.center, body.half_extent())
    x, y = camera.rays(window)
    index, x, y = _locate(camera, window, np.flatnonzero(body.closest(x[None], y[:, None]) < 1))
    quadric = body.quadric()
    x, y = x - body.center[0], y - body.center[1]
    offset = np.stack([x, y, (quadric[0, 2] * x + quadric[1, 2] * y) / -quadric[2, 2]])
    normals = quadric @ offset
    normals /= np.sqrt(np.einsum("ap,ap->p", normals, normals)) + np.float32(1e-6)
    normals = np.float32(0.9) * normals + np.array([[0], [0], [0.43]], np.float32)
    return Hits(index, offset + body.center[:, None], normals, np.zeros(len(index), np.float32))


def _cast(camera: Camera, window: Window, body: Ellipsoid) -> tuple[Array, Array]:
    """Nearest hits over a window: z [rows, columns] (MISS where none), unit normals [3, rows, columns]."""
    quadric = body.quadric()
    x, y = camera.rays(window)
    x, y = (x - body.center[0])[None], (y - body.center[1])[:, None]
    linear = quadric[0, 2] * x + quadric[1, 2] * y
    constant = (2 * quadric[0, 1] * x) * y
    constant += quadric[0, 0] * x * x - 1
    constant += quadric[1, 1] * y * y
    discriminant = linear * linear - quadric[2, 2] * constant
    z = (np.sqrt(np.maximum(discriminant, 0)) - linear) / quadric[2, 2]
    normals = np.empty((3, *z.shape), np.float32)
    for normal, row in zip(normals, quadric, strict=True):
        np.multiply(z, row[2], out=normal)
        normal += row[0] * x
        normal += row[1] * y
    normals /= np.sqrt(normals[0] ** 2 + normals[1] ** 2 + normals[2] ** 2) + np.float32(1e-6)
    return np.where(discriminant > 0, z + body.center[2], MISS), normals


def cast_ellipsoids(camera: Camera, bodies: list[Ellipsoid], *, blend: float = 0.02) -> Hits:
    """Hits of the smooth union of `bodies`; `blend`: width in world units."""
    surface = Surface(camera, bodies)
    for body in bodies:
        surface.add(body, blend=blend)
    return surface.hits()


def cast_plane(camera: Camera, frame: Frame, half_extent: tuple[float, float]) -> tuple[Hits, Array, Array]:
    """(hits, u, v) of a rectangle in the frame's x-y plane; u and v are its coordinates [P], up to `half_extent`."""
    extent = np.abs(frame.axes[:2, :2]) @ np.asarray(half_extent, np.float32)
    window = camera.window(frame.origin, extent)
    x, y = camera.rays(window)
    dx = np.broadcast_to((x - frame.origin[0])[None], (len(y), len(x)))
    dy = np.broadcast_to((y - frame.origin[1])[:, None], (len(y), len(x)))
    normal = frame.axes[:, 2]
    dz = -(normal[0] * dx + normal[1] * dy) / normal[2]
    u, v = (axis[0] * dx + axis[1] * dy + axis[2] * dz for axis in frame.axes[:, :2].T)
    flat = np.flatnonzero((np.abs(u) <= half_extent[0]) & (np.abs(v) <= half_extent[1]))
    index, x, y = _locate(camera, window, flat)
    points = np.stack([x, y, dz.ravel()[flat] + frame.origin[2]])
    normals = np.repeat(normal[:, None], len(index), 1)
    hits = Hits(index, points, normals, np.zeros(len(index), np.float32))
    return hits, u.ravel()[flat], v.ravel()[flat]
