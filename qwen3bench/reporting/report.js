// A button copies each command; a link to a folded section opens it, and so does a page opened at one.
for (const box of document.querySelectorAll("pre.copy")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    const code = box.querySelector("code");
    getSelection().selectAllChildren(code); // where the clipboard is refused, it is marked to be copied by hand
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      button.textContent = "marked";
    }
  });
  box.append(button);
}
const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
};
addEventListener("hashchange", unfold);
unfold();
