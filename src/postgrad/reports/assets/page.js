// The theme button: the reader's system decides until the reader does.
"use strict";
{
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light");
  const label = () => { button.textContent = shown() === "dark" ? "☀ light" : "☾ dark"; };
  button.addEventListener("click", () => {
    document.documentElement.style.colorScheme = shown() === "dark" ? "light" : "dark";
    label();
  });
  dark.addEventListener("change", label);
  label();
}
