// Go's net/http: `go_http serve PORT` answers `/status/N` with N and anything else with 404; `go_http get URL...`
// requests each in turn and prints the statuses.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func answer(writer http.ResponseWriter, request *http.Request) {
	status := 404
	if rest, found := strings.CutPrefix(request.URL.Path, "/status/"); found {
		status, _ = strconv.Atoi(rest)
	}
	writer.WriteHeader(status)
	if status != 204 && status != 304 {
		io.WriteString(writer, "as asked\n")
	}
}

func main() {
	if os.Args[1] == "serve" {
		fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Args[2], http.HandlerFunc(answer)))
		os.Exit(1)
	}
	for _, url := range os.Args[2:] {
		response, err := http.Get(url)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		fmt.Println(response.StatusCode)
	}
	// Its language is read from /proc while it runs, and a loaded machine may need a moment for that.
	time.Sleep(500 * time.Millisecond)
}
