{{/*
The agent's configuration: `config` as it is, and what only the chart knows. What the chart sets is refused in `config`,
so that a value never loses in silence. Null sections are left out, as the agent does.
*/}}
{{- define "spanloom.endpoint" -}}
{{- if .Values.otlp.endpoint -}}
{{- .Values.otlp.endpoint -}}
{{- else if .Values.jaeger.enabled -}}
{{- if not (include "spanloom.endpointFromEnvironment" .) -}}
{{- printf "http://%s-jaeger.%s.svc:4317" (include "spanloom.fullname" .) .Release.Namespace -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "spanloom.config" -}}
{{- $config := dict -}}
{{- range $key, $section := .Values.config -}}
{{- if not (kindIs "invalid" $section) -}}
{{- $_ := set $config $key (deepCopy $section) -}}
{{- end -}}
{{- end -}}

{{- $kubernetes := default (dict) $config.kubernetes -}}
{{- if hasKey $kubernetes "enabled" -}}
{{- fail "config.kubernetes.enabled: the chart sets it, remove it" -}}
{{- end -}}
{{- if hasKey $kubernetes "peers" -}}
{{- fail "config.kubernetes.peers: set peers.enabled instead" -}}
{{- end -}}
{{- if .Values.peers.enabled -}}
{{- $_ := set $kubernetes "peers" true -}}
{{- end -}}
{{- $_ := set $config "kubernetes" (set $kubernetes "enabled" "on") -}}

{{- $telemetry := default (dict) $config.telemetry -}}
{{- if hasKey $telemetry "listen" -}}
{{- fail "config.telemetry.listen: set telemetry.address and telemetry.port instead" -}}
{{- end -}}
{{- $listen := printf "%s:%d" .Values.telemetry.address (int .Values.telemetry.port) -}}
{{- $_ := set $config "telemetry" (set $telemetry "listen" $listen) -}}

{{- $export := default (dict) $config.export -}}
{{- $otlp := default (dict) $export.otlp -}}
{{- if $otlp.headers -}}
{{- fail "config.export.otlp.headers: put them into a Secret and name it in otlp.headersSecret" -}}
{{- end -}}
{{- if hasKey $otlp "endpoint" -}}
{{- fail "config.export.otlp.endpoint: set otlp.endpoint instead" -}}
{{- end -}}
{{- range list "certificate" "client_certificate" "client_key" -}}
{{- if hasKey $otlp . -}}
{{- fail (printf "config.export.otlp.%s: name the Secret and its keys in otlp.tls instead" .) -}}
{{- end -}}
{{- end -}}
{{- $endpoint := include "spanloom.endpoint" . -}}
{{- if $endpoint -}}
{{- $_ := set $otlp "endpoint" $endpoint -}}
{{- end -}}
{{- $tls := .Values.otlp.tls -}}
{{- if ne (empty $tls.certFile) (empty $tls.keyFile) -}}
{{- fail "otlp.tls.certFile and otlp.tls.keyFile: give both or none" -}}
{{- end -}}
{{- if $tls.secretName -}}
{{- if hasPrefix "http://" (lower $endpoint) -}}
{{- fail "otlp.tls.secretName: the endpoint begins with http://, which means plain text; write https://" -}}
{{- end -}}
{{- range $key, $file := dict "certificate" $tls.caFile "client_certificate" $tls.certFile "client_key" $tls.keyFile -}}
{{- if $file -}}
{{- $_ := set $otlp $key (printf "/etc/spanloom-tls/%s" $file) -}}
{{- end -}}
{{- end -}}
{{- else if $tls.certFile -}}
{{- fail "otlp.tls.certFile: otlp.tls.secretName must name the Secret that has it" -}}
{{- end -}}
{{- if $otlp -}}
{{- $_ := set $config "export" (set $export "otlp" $otlp) -}}
{{- end -}}
{{- /*
toYaml says nothing when it fails, and all of the configuration would be lost. The line breaks of Unicode become blanks
in toYaml (U+0085), or end the indentation (the other two).
*/ -}}
{{- $text := toYaml $config -}}
{{- if or (not $text) (regexMatch "[\\x{2028}\\x{2029}]" $text) (regexMatch "\\x{85}" (toJson $config)) -}}
{{- fail "config: a text in it has a control character or a line break of Unicode, which YAML does not carry unchanged" -}}
{{- end -}}
{{- $text -}}
{{- end -}}
