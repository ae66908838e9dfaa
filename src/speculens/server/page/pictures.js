/* Pictures of the next question: read, made smaller where the server takes no larger, shown as thumbnails. */

/**
 * A file as {name, uri, note}. It goes as it is unless it has more pixels or bytes than `limits` allow
 * ({image_pixels, image_bytes}, either may be missing); `note` says what was done to it, else it is "".
 */
export async function read(file, limits) {
  const picture = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name || "What was pasted"} cannot be read as a picture.`);
  });
  const { width, height } = picture;
  const name = file.name || "pasted picture";
  const { image_pixels: pixels = Infinity, image_bytes: bytes = Infinity } = limits;
  let scale = Math.min(1, Math.sqrt(pixels / (width * height)));
  let blob = scale < 1 ? await scaled(picture, scale) : file;
  while (blob.size > bytes && scale > 0.01) {
    if (blob !== file) scale *= Math.min(0.9, Math.sqrt(bytes / blob.size)); // the first try only packs it as JPEG
    blob = await scaled(picture, scale);
  }
  const size = (factor) => `${Math.floor(width * factor)} × ${Math.floor(height * factor)}`;
  const change = scale < 1 ? `made smaller, from ${size(1)} to ${size(scale)} pixels` : "packed as JPEG";
  const note = blob === file ? "" : `${name} was ${change}: this server takes no larger.`;
  picture.close();
  return { name, uri: await dataUri(blob), note };
}

/** The list of thumbnails, each with a button that calls `remove(index)`. */
export function show(list, pictures, remove) {
  list.replaceChildren(...pictures.map(({ name, uri }, index) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "×";
    button.setAttribute("aria-label", `Remove ${name}`);
    button.addEventListener("click", () => remove(index));
    item.append(thumbnail(name, uri), button);
    return item;
  }));
}

export function thumbnail(name, uri) {
  const image = document.createElement("img");
  image.src = uri;
  image.alt = name;
  image.draggable = false; // or a slip of the hand would drop it here as one more picture
  return image;
}

function scaled(picture, scale) {
  const canvas = new OffscreenCanvas(
    Math.max(1, Math.floor(picture.width * scale)),
    Math.max(1, Math.floor(picture.height * scale)),
  );
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // JPEG knows no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
