/* Search for pages opened from disk: browsers start no worker there, so a hidden frame runs its script instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      const document_ = frame.contentDocument
      const load = (path) => new Promise((done, failed) => {
        const script = document_.createElement("script")
        Object.assign(script, { src: path, onload: done, onerror: failed })
        document_.body.append(script)
      })
      this.scope.importScripts = (...paths) => paths.reduce((before, path) => before.then(() => load(path)), Promise.resolve())
      this.scope.postMessage = (data) => {
        const message = new MessageEvent("message", { data })
        this.onmessage?.(message)
        this.dispatchEvent(message)
      }
      this.ready = load(new URL(url, location.href).href)
    }
    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new this.scope.MessageEvent("message", { data })))
    }
    terminate() {
      this.scope.frameElement.remove()
    }
  }
}
